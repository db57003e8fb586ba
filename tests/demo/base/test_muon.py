"""Muon's updates are orthogonal in both ways to compute them, and reduce a loss."""

import copy

import pytest
import torch
from torch import Tensor

from sa_inject.demo.base import muon
from sa_inject.demo.base.muon import Muon, orthogonalise

DIRECT = [(48, 64), (64, 48), (40, 40), (40, 159)]
LONG = [(40, 160), (32, 400), (400, 32)]
BFLOAT16_NOISE = 0.06  # after five iterations
EITHER = pytest.mark.parametrize("shape", DIRECT + LONG, ids=str)


def with_singular_values(shape: tuple[int, int], smallest: float = 0.05) -> tuple[Tensor, Tensor]:
    """A matrix whose singular values go from `smallest` to 1, and the orthogonal matrix that is nearest to it."""
    rank = min(shape)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in shape)
    return u * torch.linspace(smallest, 1, rank) @ v.T, u @ v.T


@EITHER
def test_all_singular_values_come_near_one(shape):
    singular_values = torch.linalg.svdvals(orthogonalise(with_singular_values(shape)[0]))
    assert len(singular_values) == min(shape)
    assert singular_values.min() > 0.65 and singular_values.max() < 1.25  # where Jordan's coefficients leave them


@EITHER
def test_the_result_points_where_the_nearest_orthogonal_matrix_does(shape):
    matrix, nearest = with_singular_values(shape)
    assert torch.cosine_similarity(orthogonalise(matrix).flatten(), nearest.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(40, 160), (32, 400)], ids=str)
def test_both_ways_compute_the_same_polynomials(shape):
    """In float32, where only the last product of the long way is coarser."""
    matrix, _ = with_singular_values(shape)
    x = matrix / matrix.norm()
    directly = muon._directly(x, 5)
    assert (muon._by_gram_matrix(x, 5).float() - directly).norm() < 0.01 * directly.norm()


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_a_long_matrix_comes_out_as_it_would_the_direct_way(shape, monkeypatch):
    matrix, _ = with_singular_values(shape)
    by_gram_matrix = orthogonalise(matrix)
    monkeypatch.setattr(muon, "LONG", max(shape))
    directly = orthogonalise(matrix)
    assert not torch.equal(by_gram_matrix, directly)
    assert (by_gram_matrix - directly).norm() < BFLOAT16_NOISE * directly.norm()


@EITHER
def test_the_size_of_a_gradient_does_not_matter(shape):
    matrix, _ = with_singular_values(shape)
    small, large = orthogonalise(1e-3 * matrix), orthogonalise(1e3 * matrix)
    assert (small - large).norm() < BFLOAT16_NOISE * large.norm()


@EITHER
def test_no_gradient_gives_no_update(shape):
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(24, 32), (16, 8, 3, 3)], ids=str)
def test_a_step_has_the_learning_rates_length_like_one_of_adamw(shape):
    """Root mean square 0.2 of the rate (Liu et al., 2025); a convolution counts as a matrix of its outputs."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = with_singular_values((shape[0], weight[0].numel()))[0].view(shape)
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.15)
    assert (weight * weight.grad).sum() < 0


def test_weights_decay_by_the_rate_alone_where_there_is_no_gradient():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))


def descend(weight: torch.nn.Parameter, optimizer: Muon, steps: int) -> list[float]:
    """Losses on the way to the identity."""
    losses = []
    for _ in range(steps):
        loss = (weight - torch.eye(8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_steps_go_downhill():
    weight = torch.nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    losses = descend(weight, Muon([weight], lr=0.1), 60)
    assert losses[-1] < 0.1 * losses[0]


def test_a_saved_and_loaded_optimizer_goes_on_as_if_it_had_not_paused():
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1)
    descend(weight, optimizer, 5)
    resumed = torch.nn.Parameter(weight.detach().clone())
    again = Muon([resumed], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert descend(resumed, again, 5) == descend(weight, optimizer, 5)
