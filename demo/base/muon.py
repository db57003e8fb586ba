"""Muon (Keller Jordan, 2024): momentum whose matrices are made orthogonal, so that all directions have equal steps.

Scaled as in Liu et al., "Muon is scalable for LLM training" (2025), so that AdamW's learning rates can be used.
"""

import torch
from torch import Tensor

from .precision import fast_type

COEFFICIENTS: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)  # Jordan's quintic Newton-Schulz iteration


LONG: int = 4  # ratio of length to width from which iterating on the Gram matrix is cheaper


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately. (rows, columns) -> the same"""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    x = (
        _by_gram_matrix(x, iterations)
        if x.shape[1] >= LONG * x.shape[0]
        else _directly(x.to(fast_type(x.device.type)), iterations)
    )
    return (x.T if is_tall else x).float()


def _directly(x: Tensor, iterations: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _by_gram_matrix(x: Tensor, iterations: int) -> Tensor:
    """The same polynomials, computed on the short side and applied once. In bfloat16 this would diverge."""
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    total = torch.eye(len(gram), device=x.device)
    for _ in range(iterations):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        total = factor @ total
        gram = factor @ gram @ factor
    dtype = fast_type(x.device.type)
    return total.to(dtype) @ x.to(dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "average" not in state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov
                update = orthogonalise(update.flatten(1))
                gain = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * gain)
