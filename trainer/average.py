"""The weighted average of the trainables over all steps: the result of a training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class PolynomialAverage(AveragedModel):
    """Polynomial-decay averaging (Shamir and Zhang, 2013, section 4): step t counts about as t to that power.

    With a high learning rate the steps scatter around the optimum. Their average is closer to it than the last step.
    """

    def __init__(self, trainables: nn.ParameterList, power: float) -> None:
        def averaged(average: Tensor, parameter: Tensor, count: Tensor | int) -> Tensor:
            return average.lerp(parameter, (power + 1) / (power + 1 + int(count)))

        super().__init__(trainables, avg_fn=averaged)
