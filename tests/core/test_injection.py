"""Injection against the formula of the method, computed with an explicit softmax."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.injection import Reference, inject
from sa_inject.core.kv import KV, BlockKey
from sa_inject.core.lora import LoRADelta
from sa_inject.core.site import Site

B, N, M, HEADS = 2, 6, 5, 2


def naive(site: Site, references: list[Reference]) -> Tensor:
    """own + sum of weight * query_mask * softmax(q k_r^T / sqrt(d)) v_r, over the keys of the mask, in float64"""
    b, n, width = site.q.shape

    def split(x: Tensor) -> Tensor:
        return x.double().expand(b, -1, -1).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (b, heads, tokens, d)

    def attended(k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        logits = split(site.q) @ split(k).transpose(2, 3) / (width // HEADS) ** 0.5
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
        return (torch.softmax(logits, dim=-1) @ split(v)).transpose(1, 2).flatten(2)

    out = attended(site.k, site.v, None)
    for r in references:
        given = torch.ones(n) if r.query_mask is None else r.query_mask
        sees = torch.zeros(b)
        sees[slice(None) if r.rows is None else r.rows] = 1
        shares = r.weight * given.double() * sees.double()[:, None]  # (b, n)
        out = out + shares[..., None] * attended(*r.kv, r.key_mask)
    return out


def inputs(d: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Site, KV, KV]:
    """A site, a reference with a row for every row of it, and one with a single row"""
    generator = torch.Generator().manual_seed(seed)

    def tokens(b: int, n: int) -> Tensor:
        return torch.randn(b, n, HEADS * d, generator=generator).to(dtype)

    q, k, v = tokens(B, N), tokens(B, N), tokens(B, N)
    site = Site(BlockKey("input", 1), q, k, v, HEADS, height=2, width=3, attend=differentiable_attention)
    return site, KV(tokens(B, M), tokens(B, M)), KV(tokens(1, M + 2), tokens(1, M + 2))


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
    "for one row": lambda rows, one: [Reference(one, weight=0.6, rows=slice(1, 2))],
    "for rows by number": lambda rows, one: [Reference(one, 0.6, rows=torch.tensor([1])), Reference(rows)],
    "everything": lambda rows, one: [
        Reference(rows, weight=0.4, key_mask=ROWS, query_mask=HALVES),
        Reference(one),
        Reference(one, weight=2.0, query_mask=HALVES.flip(0)),
    ],
}


@pytest.mark.parametrize("d", [4, 7, 40])
@pytest.mark.parametrize("case", CASES)
def test_injection_equals_the_formula(case, d):
    site, rows, one = inputs(d)
    references = CASES[case](rows, one)
    out, expected = inject(site, references), naive(site, references)
    assert out.shape == site.q.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("d", [8, 40, 64, 80, 160])  # head widths of SD1.x, SD2.x and SDXL, and a small one
def test_injection_holds_in_half_precision(d, dtype, tolerance):
    site, rows, one = inputs(d, dtype)
    references = CASES["everything"](rows, one)
    out, expected = inject(site, references), naive(site, references)
    assert out.dtype == dtype
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_kernel_is_called_once_for_the_site_and_once_for_each_reference():
    """Without a mask, which fused kernels would not take, and in the shapes that they serve."""
    site, rows, one = inputs()
    calls = []

    def attend(*given):
        calls.append(given)
        return differentiable_attention(*given)

    site = dataclasses.replace(site, attend=attend)
    inject(site, [Reference(rows, 0.5, query_mask=HALVES), Reference(one)])
    assert [len(call) for call in calls] == [4, 4, 4]
    for (seen_q, seen_k, seen_v, heads), kv in zip(calls, (KV(site.k, site.v), rows, one), strict=True):
        assert seen_q is site.q and heads == HEADS
        assert torch.equal(seen_k, kv.k.expand(B, -1, -1)) and torch.equal(seen_v, kv.v.expand(B, -1, -1))


@pytest.mark.parametrize("rows_of_site", [slice(0, 1), torch.tensor([0])], ids=["slice", "numbers"])
def test_rows_that_do_not_see_a_reference_stay_as_they_were(rows_of_site):
    site, rows, one = inputs()
    out, own = inject(site, [Reference(one, rows=rows_of_site)]), site.self_attention()
    assert torch.equal(out[1], own[1])
    assert (out - own)[0].abs().amax(-1).min() > 0.05


def joint_site(site: Site, tokens: slice, **changes) -> Site:
    """The picture of a site between two tokens of text."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(B, 4, site.q.shape[-1], generator=generator)
    q, k, v = (torch.cat([text[:, :2], x, text[:, 2:]], dim=1) for x in (site.q, site.k, site.v))
    return dataclasses.replace(site, q=q, k=k, v=v, tokens=tokens, **changes)


@pytest.mark.parametrize("case", ["plain", "for one row", "for rows by number", "everything"])
@pytest.mark.parametrize("learns", [False, True])
def test_only_the_pictures_tokens_of_a_joint_sequence_attend_to_a_reference(case, learns):
    site, rows, one = inputs()
    tokens = slice(2, 2 + N)
    joint = joint_site(site, tokens)
    if learns:
        rows.v.requires_grad_()
        one.v.requires_grad_()
    out, own = inject(joint, CASES[case](rows, one)), joint.self_attention()
    assert torch.equal(out[:, :2], own[:, :2]) and torch.equal(out[:, -2:], own[:, -2:])
    added = inject(site, CASES[case](rows, one)) - site.self_attention()
    torch.testing.assert_close(out[:, tokens] - own[:, tokens], added, atol=1e-6, rtol=0)
    assert joint.has_whole_grid and not joint_site(site, slice(2, None)).has_whole_grid


def test_values_at_the_rank_of_the_lora_are_widened_at_use():
    site, rows, _ = inputs()
    generator = torch.Generator().manual_seed(5)
    narrow = torch.randn(*rows.v.shape[:2], 2, generator=generator)
    widen = LoRADelta(torch.zeros(2, 2), torch.randn(rows.v.shape[-1], 2, generator=generator)).widen
    wide = inject(site, [Reference(KV(rows.k, widen(narrow)), 0.7)])
    assert torch.equal(inject(site, [Reference(KV(rows.k, narrow), 0.7, widen=widen)]), wide)


def test_what_a_network_computes_itself_is_taken_as_it_is():
    site, rows, _ = inputs()
    own = torch.full_like(site.q, 0.5)
    out = inject(dataclasses.replace(site, own=own.clone), [Reference(rows)])
    added = inject(site, [Reference(rows)]) - site.self_attention()
    torch.testing.assert_close(out - own, added, atol=1e-6, rtol=0)


def test_values_of_zero_add_nothing_at_all():
    site, rows, _ = inputs()
    silent = Reference(KV(rows.k, torch.zeros_like(rows.v)))
    assert torch.equal(inject(site, [silent]), site.self_attention())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_query_that_may_not_look_stays_as_it_was(dtype):
    site, rows, _ = inputs(40, dtype)
    query_mask = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    out, own = inject(site, [Reference(rows, query_mask=query_mask)]), site.self_attention()
    blind = query_mask == 0
    assert torch.equal(out[:, blind], own[:, blind])
    assert (out - own)[:, ~blind].abs().amax(dim=(0, 2)).min() > 0.05


def test_masked_out_tokens_do_not_matter():
    site, rows, _ = inputs()
    key_mask = torch.tensor([[True, False, True, False, False]] * B)
    hidden = ~key_mask[..., None]
    other = KV(rows.k.masked_fill(hidden, 30.0), rows.v.masked_fill(hidden, -30.0))
    out, changed = (inject(site, [Reference(kv, key_mask=key_mask)]) for kv in (rows, other))
    without = inject(site, [Reference(KV(rows.k[:, [0, 2]], rows.v[:, [0, 2]]))])
    torch.testing.assert_close(out, changed, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, without, atol=1e-6, rtol=0)


def test_reference_of_another_precision_takes_ours():
    site, rows, _ = inputs()
    reference = Reference(KV(rows.k.double(), rows.v.half()))
    out = inject(site, [reference])
    assert out.dtype == site.q.dtype
    torch.testing.assert_close(out, naive(site, [reference]).float())


@pytest.mark.parametrize("case", ["plain", "for one row", "for rows by number", "everything"])
def test_gradients_are_those_of_the_formula(case):
    site, rows, one = inputs()
    references = CASES[case](rows, one)
    leaves = [site.q, site.k, site.v, *(x for kv in {id(r.kv): r.kv for r in references}.values() for x in kv)]
    for leaf in leaves:
        leaf.requires_grad_()
    target = torch.randn(site.q.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((inject(site, references) * target).sum(), leaves)
    expected = torch.autograd.grad((naive(site, references) * target).sum(), leaves)
    for gradient, wanted in zip(ours, expected, strict=True):
        assert wanted.abs().max() > 0
        assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_inputs_are_left_as_they_were():
    site, rows, one = inputs()
    tensors = [site.q, site.k, site.v, *rows, *one, HALVES, ROWS]
    before = [x.clone() for x in tensors]
    inject(site, CASES["everything"](rows, one))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
