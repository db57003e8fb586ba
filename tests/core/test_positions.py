"""The three position rules: how the queries of a picture and the keys of a reference are rotated."""

import dataclasses

import pytest
import torch
from torch import Tensor

from sa_inject.core.kv import KV, BlockKey
from sa_inject.core.positions import POSITION_RULES, Rotation
from sa_inject.core.site import Site

HEADS, D, INDEX_PAIRS = 2, 12, 2  # a head's numbers are six pairs, two of them for the index


def turned(angles: Tensor) -> Tensor:
    """(..., pairs) -> (..., pairs, 2, 2)"""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


SPEEDS = torch.tensor([1.0, 0.1])


def rotation(index: float, height: int, width: int) -> Rotation:
    """Of a picture at this index: two pairs turn by the index, two by the row and two by the column."""
    row = torch.arange(height).repeat_interleave(width).float()
    column = torch.arange(width).repeat(height).float()
    angles = torch.cat([place[:, None] * SPEEDS for place in (torch.full_like(row, index), row, column)], dim=-1)
    return Rotation(turned(angles)[None], INDEX_PAIRS, turned(3.0 * SPEEDS))


def placed_by(turns: Rotation, x: Tensor) -> Tensor:
    return (turns.matrices[:, :, None] * x.unflatten(-1, (HEADS, -1, 1, 2))).sum(-1).flatten(2)


def logits(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x.unflatten(-1, (HEADS, D)).transpose(1, 2) for x in (q, k))
    return q @ k.mT


def random(m: int, seed: int) -> Tensor:
    return torch.randn(1, m, HEADS * D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_logits_are_those_of_the_positions_that_a_rule_stands_for(rule):
    """The drawing stands at index 40 (after a long text), the reference was read at index 7, on another grid."""
    drawing, read = rotation(40.0, 3, 4), rotation(7.0, 2, 5)
    q, k = random(12, 1), random(10, 2)
    queries = drawing.of_queries(placed_by(drawing, q), HEADS, rule)
    keys = read.of_keys(read.undone(placed_by(read, k), HEADS), HEADS, rule)
    expected = {
        "none": logits(q, k),
        "same": logits(placed_by(drawing, q), placed_by(rotation(40.0, 2, 5), k)),
        "index": logits(placed_by(drawing, q), placed_by(rotation(43.0, 2, 5), k)),
    }
    torch.testing.assert_close(logits(queries, keys), expected[rule], atol=1e-5, rtol=0)


def test_gradients_go_through_and_half_precision_stays():
    turns = rotation(2.0, 2, 2)
    x = random(4, 3).requires_grad_()
    turns.of_keys(turns.of_queries(x, HEADS, "same"), HEADS, "index").square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=1e-5, rtol=0)  # rotations keep lengths
    assert turns.undone(x.bfloat16(), HEADS).dtype == torch.bfloat16


def test_a_site_takes_the_pictures_tokens_and_undoes_their_positions():
    turns, x = rotation(5.0, 2, 2), random(4, 4)
    text = random(3, 5)
    joint = torch.cat([text, placed_by(turns, x)], dim=1)
    site = Site(BlockKey("layers", 0), joint, joint, joint, HEADS, 2, 2, attend, tokens=slice(3, 7), rotation=turns)
    torch.testing.assert_close(site.picture_queries(), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(site.picture_keys, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(site.placed(site.picture_keys, "none"), x, atol=1e-6, rtol=0)
    without = dataclasses.replace(site, rotation=None)
    assert torch.equal(without.picture_queries("index"), joint[:, 3:])
    assert KV(without.placed(x, "index"), x).k is x


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    raise AssertionError("nothing is attended to here")
