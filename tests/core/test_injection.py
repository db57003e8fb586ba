"""Injection against the formula of the method, computed with an explicit softmax."""

import pytest
import torch
from torch import Tensor

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.injection import Reference, inject
from sa_inject.core.kv import KV

B, N, M, HEADS = 2, 6, 5, 2


def naive(self_attention_out: Tensor, q: Tensor, references: list[Reference], heads: int) -> Tensor:
    """attended + sum of weight * query_mask * softmax(q k_r^T / sqrt(d)) v_r, over the keys of the mask, in float64"""
    b, n, _ = q.shape

    def split(x: Tensor) -> Tensor:
        return x.double().expand(b, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, heads, tokens, d)

    out = self_attention_out.double()
    for r in references:
        logits = split(q) @ split(r.kv.k).transpose(2, 3) / (q.shape[-1] // heads) ** 0.5
        if r.key_mask is not None:
            logits = logits.masked_fill(~r.key_mask[:, None, None], -torch.inf)
        given = torch.ones(n) if r.query_mask is None else r.query_mask
        added = (torch.softmax(logits, dim=-1) @ split(r.kv.v)).transpose(1, 2).flatten(2)
        out = out + r.weight * given.double()[:, None] * added
    return out


def inputs(d: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, KV, KV]:
    """What was attended to, q, a reference with a row for every row of q, and one with a single row"""
    generator = torch.Generator().manual_seed(seed)

    def tokens(b: int, n: int) -> Tensor:
        return torch.randn(b, n, HEADS * d, generator=generator).to(dtype)

    return tokens(B, N), tokens(B, N), KV(tokens(B, M), tokens(B, M)), KV(tokens(1, M + 2), tokens(1, M + 2))


HALVES = torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0, 0.01])  # (N,)
ROWS = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 1]]).bool()  # (B, M)

CASES = {
    "no reference": lambda rows, one: [],
    "plain": lambda rows, one: [Reference(rows)],
    "one row for the batch": lambda rows, one: [Reference(one)],
    "several plain": lambda rows, one: [Reference(rows), Reference(one), Reference(rows)],
    "weak": lambda rows, one: [Reference(rows, weight=0.3)],
    "strong": lambda rows, one: [Reference(one, weight=4.0)],
    "key mask": lambda rows, one: [Reference(rows, key_mask=ROWS)],
    "query mask": lambda rows, one: [Reference(rows, query_mask=HALVES)],
    "two query masks": lambda rows, one: [Reference(rows, query_mask=HALVES), Reference(one, query_mask=1 - HALVES)],
    "everything": lambda rows, one: [
        Reference(rows, weight=0.4, key_mask=ROWS, query_mask=HALVES),
        Reference(one),
        Reference(one, weight=2.0, query_mask=HALVES.flip(0)),
    ],
}


@pytest.mark.parametrize("d", [4, 7, 40])
@pytest.mark.parametrize("case", CASES)
def test_injection_equals_the_formula(case, d):
    self_attention_out, q, rows, one = inputs(d)
    references = CASES[case](rows, one)
    out = inject(self_attention_out, q, references, HEADS, differentiable_attention)
    expected = naive(self_attention_out, q, references, HEADS)
    assert out.shape == q.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("d", [8, 40, 64, 80, 160])  # head widths of SD1.x, SD2.x and SDXL, and a small one
def test_injection_holds_in_half_precision(d, dtype, tolerance):
    self_attention_out, q, rows, one = inputs(d, dtype)
    references = CASES["everything"](rows, one)
    out = inject(self_attention_out, q, references, HEADS, differentiable_attention)
    expected = naive(self_attention_out, q, references, HEADS)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_kernel_is_called_once_for_each_reference_with_its_tokens_alone():
    """Without a mask, which fused kernels would not take, and in the shapes that they serve."""
    self_attention_out, q, rows, one = inputs()
    calls = []

    def attend(*given):
        calls.append(given)
        return differentiable_attention(*given)

    inject(self_attention_out, q, [Reference(rows, 0.5, query_mask=HALVES), Reference(one)], HEADS, attend)
    assert [len(call) for call in calls] == [4, 4]
    for (seen_q, seen_k, seen_v, heads), kv in zip(calls, (rows, one), strict=True):
        assert seen_q is q and heads == HEADS
        assert torch.equal(seen_k, kv.k.expand(B, -1, -1)) and torch.equal(seen_v, kv.v.expand(B, -1, -1))


def test_values_of_zero_add_nothing_at_all():
    self_attention_out, q, rows, _ = inputs()
    silent = Reference(KV(rows.k, torch.zeros_like(rows.v)))
    assert torch.equal(inject(self_attention_out, q, [silent], HEADS, differentiable_attention), self_attention_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_query_that_may_not_look_stays_as_it_was(dtype):
    self_attention_out, q, rows, _ = inputs(40, dtype)
    query_mask = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    out = inject(self_attention_out, q, [Reference(rows, query_mask=query_mask)], HEADS, differentiable_attention)
    blind = query_mask == 0
    assert torch.equal(out[:, blind], self_attention_out[:, blind])
    assert (out - self_attention_out)[:, ~blind].abs().amax(dim=(0, 2)).min() > 0.05


def test_masked_out_tokens_do_not_matter():
    self_attention_out, q, rows, _ = inputs()
    key_mask = torch.tensor([[True, False, True, False, False]] * B)
    hidden = ~key_mask[..., None]
    other = KV(rows.k.masked_fill(hidden, 30.0), rows.v.masked_fill(hidden, -30.0))
    out, changed = (
        inject(self_attention_out, q, [Reference(kv, key_mask=key_mask)], HEADS, differentiable_attention)
        for kv in (rows, other)
    )
    kept = KV(rows.k[:, [0, 2]], rows.v[:, [0, 2]])
    without = inject(self_attention_out, q, [Reference(kept)], HEADS, differentiable_attention)
    torch.testing.assert_close(out, changed, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, without, atol=1e-6, rtol=0)


def test_reference_of_another_precision_takes_ours():
    self_attention_out, q, rows, _ = inputs()
    reference = Reference(KV(rows.k.double(), rows.v.half()))
    out = inject(self_attention_out, q, [reference], HEADS, differentiable_attention)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out, naive(self_attention_out, q, [reference], HEADS).float())


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_gradients_are_those_of_the_formula(case):
    self_attention_out, q, rows, one = inputs()
    leaves = [self_attention_out, q, *rows, *one] if case == "everything" else [self_attention_out, q, *rows]
    for leaf in leaves:
        leaf.requires_grad_()
    references = CASES[case](rows, one)
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = inject(self_attention_out, q, references, HEADS, differentiable_attention)
    ours = torch.autograd.grad((out * target).sum(), leaves)
    expected = torch.autograd.grad((naive(self_attention_out, q, references, HEADS) * target).sum(), leaves)
    for gradient, truth in zip(ours, expected, strict=True):
        assert truth.abs().max() > 0
        assert (gradient - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_inputs_are_left_as_they_were():
    self_attention_out, q, rows, one = inputs()
    masks = [HALVES, ROWS]
    before = [x.clone() for x in (self_attention_out, q, *rows, *one, *masks)]
    inject(self_attention_out, q, CASES["everything"](rows, one), HEADS, differentiable_attention)
    assert all(torch.equal(x, y) for x, y in zip((self_attention_out, q, *rows, *one, *masks), before, strict=True))
