"""The average of what the steps came to, which is what is learned in the end."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class PolynomialAverage(AveragedModel):
    """Polynomial-decay averaging (Shamir and Zhang, 2013, section 4): step t counts about as t to that power.

    With a high learning rate the steps go around what they look for, and their average is nearer to it than the last.
    """

    def __init__(self, trainables: nn.ParameterList, power: float) -> None:
        def averaged(average: Tensor, parameter: Tensor, count: Tensor | int) -> Tensor:
            return average.lerp(parameter, (power + 1) / (power + 1 + int(count)))

        super().__init__(trainables, avg_fn=averaged)
