"""Operations of a frozen network: torch's results and gradients, with less stored for the backward pass."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sa_inject.trainer.frozen_ops import CastBuffer, frozen_conv2d, frozen_linear, recompute

Run = Callable[[Tensor], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def result_and_gradient(run: Run, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    return out.detach(), torch.autograd.grad(out, x, random(*out.shape, seed=9))[0]


def kept(run: Run, x: Tensor) -> list[Tensor]:
    """What autograd holds on to."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x.clone().requires_grad_())
    return found


def assert_same(lean: Run, plain: Run, x: Tensor) -> None:
    for found, expected in zip(result_and_gradient(lean, x), result_and_gradient(plain, x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear_equals_torchs_and_keeps_the_stored_weight_only(stored, has_bias):
    weight, bias = random(5, 4).to(stored), random(5, seed=1).to(stored) if has_bias else None
    lean = partial(frozen_linear, weight=weight, bias=bias, buffer=CastBuffer())
    x = random(2, 3, 4, seed=2)
    assert_same(lean, lambda x: F.linear(x, weight.float(), None if bias is None else bias.float()), x)
    (only,) = kept(lean, x)
    assert only.data_ptr() == weight.data_ptr() and only.dtype == stored


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 0, 2, 2)])
def test_convolution_equals_torchs_and_keeps_the_stored_weight_only(stored, stride, padding, dilation, groups):
    weight, bias = random(6, 4 // groups, 3, 3).to(stored), random(6, seed=1).to(stored)
    settings = (stride, padding, dilation, groups)
    x = random(2, 4, 9, 8, seed=2)

    def lean(x: Tensor) -> Tensor:
        return frozen_conv2d(x, weight, bias, CastBuffer(), *settings)

    assert_same(lean, lambda x: F.conv2d(x, weight.float(), bias.float(), *settings), x)
    (only,) = kept(lean, x)
    assert only.data_ptr() == weight.data_ptr() and only.dtype == stored


def test_one_buffer_serves_layers_of_every_size_in_turn():
    buffer = CastBuffer()
    layers = [nn.Linear(4, 8).half(), nn.Linear(8, 3).half(), nn.Linear(3, 9).half()]
    for layer in layers:
        layer.requires_grad_(False)

    def lean(x: Tensor) -> Tensor:
        for layer in layers:
            x = frozen_linear(x, layer.weight, layer.bias, buffer)
        return x

    def plain(x: Tensor) -> Tensor:
        for layer in layers:
            x = F.linear(x, layer.weight.float(), layer.bias.float())
        return x

    assert_same(lean, plain, random(2, 4))
    assert_same(lean, plain, random(2, 4))


def test_weights_of_the_computations_type_are_not_copied():
    weight = random(3, 4)
    assert CastBuffer().cast(weight, random(1)) is weight


def test_recomputed_equals_the_plain_function_and_keeps_its_input_only():
    norm = nn.GroupNorm(2, 4).requires_grad_(False)

    def plain(x: Tensor) -> Tensor:
        return F.silu(norm(x))

    x = random(2, 4, 5, 5)
    assert_same(partial(recompute, plain), plain, x)
    assert [tensor.shape for tensor in kept(partial(recompute, plain), x)] == [x.shape]


def test_recomputed_functions_may_be_nested():
    weight = random(4, 4).half()
    buffer = CastBuffer()

    def inner(x: Tensor) -> Tensor:
        return frozen_linear(x, weight, None, buffer).tanh()

    def plain(x: Tensor) -> Tensor:
        return (x + F.linear(x, weight.float()).tanh()).exp()

    assert_same(partial(recompute, lambda x: (x + recompute(inner, x)).exp()), plain, random(3, 4))


def test_nothing_is_kept_for_an_input_without_gradient():
    x = random(2, 4)
    assert not frozen_linear(x, random(3, 4), None, CastBuffer()).requires_grad
    assert not recompute(torch.tanh, x).requires_grad
