"""Operations of a frozen network that store little for the backward pass, with the same results as torch's.

Torch stores what the gradients of all arguments need. A frozen layer needs the gradient of its input only. The weight
is enough for that, and it is in memory anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input  # pyright: ignore[reportUnknownVariableType]


class CastBuffer:
    """Casts weights into one buffer. Each cast overwrites the last.

    New memory for each cast would fragment the memory between stored tensors.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def cast(self, weight: Tensor, like: Tensor) -> Tensor:
        """The weight in the type of `like`. Not copied if it has that type."""
        if weight.dtype == like.dtype:
            return weight
        memory = self._memory
        if memory.dtype != like.dtype or memory.device != like.device or memory.numel() < weight.numel():
            memory = self._memory = like.new_empty(weight.numel())
        return memory[: weight.numel()].view(weight.shape).copy_(weight)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: CastBuffer) -> Tensor:
    """F.linear in the type of x, for frozen weights of any type. x (..., in), weight (out, in) -> (..., out)

    Only the weight is stored for the backward pass, without a copy.
    """
    return _apply(_Linear, x, weight, bias, buffer)


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, buffer: CastBuffer, stride: Any, padding: Any, *settings: Any
) -> Tensor:
    """F.conv2d in the type of x, for frozen weights of any type. `settings`: dilation and groups. (b, c, h, w)

    Only the weight is stored for the backward pass, without a copy.
    """
    return _apply(_Convolution, x, weight, bias, buffer, (stride, padding, *settings))


def recompute(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), storing only x. `run` must be a frozen function: only x gets a gradient."""
    return _apply(_Recomputed, run, x)


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """Torch leaves untyped what a function of ours returns."""
    untyped: Any = function
    return untyped.apply(*inputs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, buffer: CastBuffer) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.buffer = buffer
        return F.linear(x, buffer.cast(weight, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ ctx.buffer.cast(weight, gradient), None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, buffer: CastBuffer, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.buffer, ctx.size, ctx.how = buffer, x.shape, how
        return F.conv2d(x, buffer.cast(weight, x), None if bias is None else bias.to(x.dtype), *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return conv2d_input(ctx.size, ctx.buffer.cast(weight, gradient), gradient, *ctx.how), None, None, None, None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.run(x)
        return None, torch.autograd.grad(out, x, gradients)[0]
