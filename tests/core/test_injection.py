"""Injection against the formula of the method, computed with an explicit softmax."""

import pytest
import torch
from torch import Tensor

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.injection import CHANNEL_MULTIPLE, Reference, inject
from sa_inject.core.kv import KV

B, N, M, HEADS = 2, 6, 5, 2


def naive(q: Tensor, own: KV, references: list[Reference], heads: int) -> Tensor:
    """softmax(q [k, k_r]^T / sqrt(d) + [0, log(weight * key_mask * query_mask)]) [v, v_r] in float64"""
    b, n, _ = q.shape

    def split(x: Tensor) -> Tensor:
        return x.double().expand(b, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, heads, tokens, d)

    shares = [torch.ones(b, n, own.k.shape[1], dtype=torch.float64)]
    for r in references:
        share = torch.full((b, n, r.kv.k.shape[1]), float(r.weight), dtype=torch.float64)
        if r.key_mask is not None:
            share = share * r.key_mask.double()[:, None, :]
        if r.query_mask is not None:
            share = share * r.query_mask.double()[None, :, None]
        shares.append(share)
    k = torch.cat([split(own.k), *(split(r.kv.k) for r in references)], dim=2)
    v = torch.cat([split(own.v), *(split(r.kv.v) for r in references)], dim=2)
    logits = split(q) @ k.transpose(2, 3) / (q.shape[-1] // heads) ** 0.5
    weights = torch.softmax(logits + torch.cat(shares, dim=2).log()[:, None], dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def inputs(d: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, KV, KV, KV]:
    """q, the UNet's own tokens, a reference with a row for every row of q, and one with a single row"""
    generator = torch.Generator().manual_seed(seed)

    def tokens(b: int, n: int) -> Tensor:
        return torch.randn(b, n, HEADS * d, generator=generator).to(dtype)

    kv = [KV(tokens(*size), tokens(*size)) for size in ((B, N), (B, M), (1, M + 2))]
    return tokens(B, N), *kv


HALVES = torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0, 0.01])  # (N,)
ROWS = torch.tensor([[0.0, 1.0, 0.3, 0.0, 1.0], [1.0, 0.0, 0.0, 0.7, 1.0]])  # (B, M)
ONE_ROW = torch.tensor([[1.0, 0.0, 0.2, 1.0, 0.0, 0.9, 0.4]])  # (1, M + 2)

CASES = {
    "no reference": lambda rows, one: [],
    "plain": lambda rows, one: [Reference(rows)],
    "one row for the batch": lambda rows, one: [Reference(one)],
    "several plain": lambda rows, one: [Reference(rows), Reference(one), Reference(rows)],
    "weak": lambda rows, one: [Reference(rows, weight=0.3)],
    "strong": lambda rows, one: [Reference(one, weight=4.0)],
    "several weights": lambda rows, one: [Reference(rows, weight=0.5), Reference(one), Reference(rows, weight=1.7)],
    "key mask": lambda rows, one: [Reference(rows, key_mask=ROWS)],
    "key masks of one row and of all": lambda rows, one: [
        Reference(one, key_mask=ONE_ROW),
        Reference(rows, key_mask=ROWS),
    ],
    "query mask": lambda rows, one: [Reference(rows, query_mask=HALVES)],
    "two query masks": lambda rows, one: [Reference(rows, query_mask=HALVES), Reference(one, query_mask=1 - HALVES)],
    "everything": lambda rows, one: [
        Reference(rows, weight=0.4, key_mask=ROWS, query_mask=HALVES),
        Reference(one),
        Reference(one, weight=2.0, key_mask=ONE_ROW, query_mask=HALVES.flip(0)),
    ],
}


@pytest.mark.parametrize("d", [4, 7, 40])  # 7 leaves room for one channel before the next multiple, 4 for more
@pytest.mark.parametrize("case", CASES)
def test_injection_equals_the_formula(case, d):
    q, own, rows, one = inputs(d)
    references = CASES[case](rows, one)
    out = inject(q, own, references, HEADS, differentiable_attention)
    expected = naive(q, own, references, HEADS)
    assert out.shape == q.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("d", [8, 40, 64, 80, 160])  # head widths of SD1.x, SD2.x and SDXL, and a small one
def test_injection_holds_in_half_precision(d, dtype, tolerance):
    q, own, rows, one = inputs(d, dtype)
    references = CASES["everything"](rows, one)
    out = inject(q, own, references, HEADS, differentiable_attention)
    expected = naive(q, own, references, HEADS)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


class Attend:
    """Attention that remembers with what it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        self.calls.append((q, k, v, heads))
        return differentiable_attention(q, k, v, heads)


def test_weight_one_is_plain_concatenation_in_one_call():
    q, own, rows, one = inputs()
    attend = Attend()
    inject(q, own, [Reference(rows), Reference(one)], HEADS, attend)
    ((seen_q, seen_k, seen_v, heads),) = attend.calls
    assert seen_q is q and heads == HEADS
    assert torch.equal(seen_k, torch.cat([own.k, rows.k, one.k.expand(B, -1, -1)], dim=1))
    assert torch.equal(seen_v, torch.cat([own.v, rows.v, one.v.expand(B, -1, -1)], dim=1))


@pytest.mark.parametrize("d", [4, 7, 8, 40])
def test_bias_takes_one_call_of_a_width_that_fused_kernels_serve(d):
    q, own, rows, one = inputs(d)
    attend = Attend()
    inject(q, own, CASES["everything"](rows, one), HEADS, attend)
    (call,) = attend.calls
    widths = {x.shape[-1] // HEADS for x in call[:3]}
    assert len(widths) == 1
    assert widths.pop() % CHANNEL_MULTIPLE == 0


def test_weight_two_equals_the_same_reference_twice():
    q, own, rows, _ = inputs()
    once = inject(q, own, [Reference(rows, weight=2.0)], HEADS, differentiable_attention)
    twice = inject(q, own, [Reference(rows)] * 2, HEADS, differentiable_attention)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_query_that_may_not_look_attends_to_its_own_tokens_only(dtype):
    q, own, rows, _ = inputs(40, dtype)
    query_mask = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    out = inject(q, own, [Reference(rows, query_mask=query_mask)], HEADS, differentiable_attention)
    alone = differentiable_attention(q, *own, HEADS)
    blind = query_mask == 0
    assert (out - alone)[:, blind].abs().max() <= max(1e-6, torch.finfo(dtype).eps) * alone.abs().max()
    assert (out - alone)[:, ~blind].abs().amax(dim=(0, 2)).min() > 0.05


def test_masked_out_tokens_do_not_matter():
    q, own, rows, _ = inputs()
    key_mask = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    hidden = (key_mask == 0)[..., None]
    other = KV(rows.k.masked_fill(hidden, 30.0), rows.v.masked_fill(hidden, -30.0))
    out, changed = (
        inject(q, own, [Reference(kv, key_mask=key_mask)], HEADS, differentiable_attention) for kv in (rows, other)
    )
    kept = KV(rows.k[:, [0, 2]], rows.v[:, [0, 2]])
    without = inject(q, own, [Reference(kept)], HEADS, differentiable_attention)
    torch.testing.assert_close(out, changed, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, without, atol=1e-6, rtol=0)


def test_reference_of_another_precision_takes_ours():
    q, own, rows, _ = inputs()
    reference = Reference(KV(rows.k.double(), rows.v.half()))
    out = inject(q, own, [reference], HEADS, differentiable_attention)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out, naive(q, own, [reference], HEADS).float())


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_gradients_are_those_of_the_formula(case):
    q, own, rows, one = inputs()
    leaves = [q, *own, *rows, *one] if case == "everything" else [q, *own, *rows]
    for leaf in leaves:
        leaf.requires_grad_()
    references = CASES[case](rows, one)
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((inject(q, own, references, HEADS, differentiable_attention) * target).sum(), leaves)
    expected = torch.autograd.grad((naive(q, own, references, HEADS) * target).sum(), leaves)
    for gradient, truth in zip(ours, expected, strict=True):
        assert truth.abs().max() > 0
        assert (gradient - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_inputs_are_left_as_they_were():
    q, own, rows, one = inputs()
    masks = [HALVES, ROWS, ONE_ROW]
    before = [x.clone() for x in (q, *own, *rows, *one, *masks)]
    inject(q, own, CASES["everything"](rows, one), HEADS, differentiable_attention)
    assert all(torch.equal(x, y) for x, y in zip((q, *own, *rows, *one, *masks), before, strict=True))
