"""The training loop: LoRA and token embedding together, from the first step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from ..core.image_prompt import TextConditioning
from ..core.lora import SelfAttentionLoRA
from .average import PolynomialAverage
from .batches import Batch, BatchSampler, RandomState
from .config import TrainConfig
from .denoiser import Denoiser
from .examples import TrainingSet
from .losses import Loss, PairLosses
from .noised import NoisedPairs
from .optimizers import build_optimizer, build_schedule
from .workers import Alone, Workers, sum_gradients


class Step(NamedTuple):
    """The report of one optimizer step."""

    number: int  # counts from 1
    loss: float
    gradient_norm: float | None = None  # before clipping; None if no parameter has a gradient


# After so many overflows in a row, the run has diverged. The loss scale starts at 65536 and is halved each time, so it
# is far below 1 by then.
OVERFLOWS_IN_A_ROW = 24


class DivergedError(RuntimeError):
    """The loss or the gradients are NaN or infinite."""


class Training(Iterator[Step]):
    """Trains in place, one optimizer step per `next()`. The adapter is usable after any step.

    Call `apply_average()` at the end to replace the trainables by their average over the steps. `state_dict()` has
    everything that another run needs to resume, with the same result bit for bit.

    `max_rows` is the number of pairs that are denoised at once. None: the whole batch. Fewer need less memory, and the
    step differs by rounding only. It may change between steps.
    """

    max_rows: int | None = None

    def __init__(
        self,
        denoiser: Denoiser,
        data: TrainingSet,
        lora: SelfAttentionLoRA,
        tokens: Sequence[nn.Parameter],
        reference_caption: str,
        config: TrainConfig,
        device: torch.device,
        compute_dtype: torch.dtype = torch.float32,
        workers: Workers | None = None,
    ) -> None:
        """`reference_caption` is the text of the reference pass. It has no placeholder token, so it is encoded once.

        `workers` are the processes that share every batch. All other arguments are the same in each of them.
        """
        self.losses: list[float] = []  # of all complete steps
        self._gradient_norm: float | None = None
        self.overflows = 0  # batches without a step, because their gradients overflowed in float16
        self._config = config
        self._device = device
        self._trainables = nn.ParameterList([*lora.parameters(), *tokens])
        self._average = (
            None if config.average_power is None else PolynomialAverage(self._trainables, config.average_power)
        )
        self._tokens = list(tokens)
        self._token_norms = [_norms(token.detach()) for token in tokens]
        self._workers = workers or Alone()
        for token in tokens:
            token.requires_grad_(config.token_learning_rate > 0)
        has_class_pictures = len(getattr(data, "class_pictures", ())) > 0
        self._losses = PairLosses(denoiser, lora, reference_caption, config, device, compute_dtype, has_class_pictures)
        self._uses_class_pictures = has_class_pictures and config.options.prior_weight > 0
        self._batches = BatchSampler(data, denoiser.sigmas.cpu(), config, device)
        self._random_state = self._batches.state()  # after the last complete step
        self._optimizer = build_optimizer(config, lora.parameters(), self._tokens)
        self._schedule = build_schedule(self._optimizer, config)
        self._scaler = GradScaler(device.type, enabled=config.loss_scaling)
        self._scale = self._scaler.state_dict()  # after the last complete step

    def __next__(self) -> Step:
        """Take a step. Raises DivergedError, without the step, if the loss is not finite.

        A batch whose scaled gradients overflow is skipped, and the next one is tried with a lower scale.
        """
        if len(self.losses) >= self._config.steps:
            raise StopIteration
        number = len(self.losses) + 1
        if number > self._config.options.token_freeze_after * self._config.steps:
            self._freeze_tokens()
        for _ in range(OVERFLOWS_IN_A_ROW):
            loss = sum(self._accumulate_gradients() for _ in range(self._config.gradient_accumulation))
            loss = sum_gradients(list(self._trainables), loss, self._workers)
            if not math.isfinite(loss):
                raise DivergedError(
                    f"The loss became {loss} at step {number}. Lower the learning rates, or choose a wider precision."
                )
            if self._optimize(number):
                break
            self.overflows += 1
        else:
            raise DivergedError(
                f"At step {number} the gradients of {OVERFLOWS_IN_A_ROW} batches in a row were no numbers in float16, "
                "so nothing can be learned. Choose the precision bf16 or fp32."
            )
        self.losses.append(loss)
        if self._schedule is not None:
            self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self._trainables)
        self._random_state, self._scale = self._batches.state(), self._scaler.state_dict()
        return Step(number, loss, self._gradient_norm)

    def _optimize(self, number: int) -> bool:
        """Update the trainables and clear their gradients. -> whether the gradients were finite

        Raises DivergedError, without the update, if they are not finite and there is no loss scale.
        """
        config = self._config
        if all(parameter.grad is None for parameter in self._trainables):
            self._optimizer.step()  # without gradients: the token alone, and it is frozen
            self._gradient_norm = None
            return True
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trainables, config.max_gradient_norm)
        self._gradient_norm = norm.item()
        is_finite = math.isfinite(self._gradient_norm)
        if not (is_finite or config.loss_scaling):
            raise DivergedError(f"The gradient became {norm.item()} at step {number}. Lower the learning rates.")
        if is_finite:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        if self._losses.trains_token_embedding:
            self._restore_token_norms()
        return is_finite

    def _freeze_tokens(self) -> None:
        self._losses.trains_token_embedding = False
        for token in self._tokens:
            token.requires_grad_(False)

    def _restore_token_norms(self) -> None:
        """Scale every token vector to its initial norm, with `keep_token_norm`.

        A vector with a large norm dominates the rest of a prompt.
        """
        if not self._config.options.keep_token_norm:
            return
        with torch.no_grad():
            for token, norm in zip(self._tokens, self._token_norms, strict=True):
                token.mul_(norm / _norms(token).clamp(min=torch.finfo(token.dtype).tiny))

    @property
    def reference_text(self) -> TextConditioning:
        """The encoded text of the reference pass. It is the same in all steps."""
        return self._losses.reference_text

    def apply_average(self) -> None:
        """Replace the trainables by their average over the steps, if there is one."""
        if self._average is not None:
            self._trainables.load_state_dict(self._average.module.state_dict())
            self._restore_token_norms()

    @contextlib.contextmanager
    def averaged(self) -> Generator[None]:
        """Inside, the trainables are as after `apply_average`."""
        before = [parameter.detach().clone() for parameter in self._trainables]
        try:
            if self.losses:  # before the first step there is no average
                self.apply_average()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._trainables, before, strict=True):
                    parameter.copy_(value)

    def rewind(self) -> None:
        """Undo the random draws and the gradients of a failed step."""
        self._batches.restore(self._random_state)
        self._scaler.load_state_dict(self._scale)
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss_of(self, group: NoisedPairs) -> float:
        """Mean loss of pairs of one shape, without gradients."""
        learns = self._losses.trains_token_embedding
        self._losses.trains_token_embedding = True  # do not cache the text: it may be that of an average
        try:
            parts = ((next(iter(self._losses.of_pairs(part))), len(part.pairs)) for part in self._parts(group))
            return sum(loss.value.item() * rows for loss, rows in parts) / len(group.pairs)
        finally:
            self._losses.trains_token_embedding = learns

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Learning rates of the LoRA and the token embedding in the next step. With Prodigy: its current estimates."""
        lora, tokens = (group["lr"] * group.get("d", 1.0) for group in self._optimizer.param_groups)
        return lora, tokens if self._losses.trains_token_embedding else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The state after the last complete step: numbers, lists and tensors for torch.load(weights_only=True).

        The tensors are not copies: save or copy them before the next step.
        """
        return {
            "losses": list(self.losses),
            "trainables": self._trainables.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scale,
            "generator": self._random_state.generator,
            "waiting": list(self._random_state.remaining),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. The pictures and the settings must be the same, except for `steps`."""
        self._trainables.load_state_dict(state["trainables"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._scale = state["scaler"]
        self._batches.restore(RandomState(state["generator"], list(state["waiting"])))
        self.losses = list(state["losses"])
        self._random_state = self._batches.state()
        self._optimizer.zero_grad(set_to_none=True)  # of a failed step

    def _accumulate_gradients(self) -> float:
        """Accumulate the gradients of this process's part of a batch and of its class pictures. -> the loss"""
        total = self._backward(self._batches.draw(), 1.0, self._losses.of_pairs)
        if self._uses_class_pictures:
            weight = self._config.options.prior_weight
            total += self._backward(self._batches.draw_class_pictures(), weight, self._losses.of_class_pairs)
        return total

    def _backward(self, batch: Batch, weight: float, losses: Callable[[NoisedPairs], Iterator[Loss]]) -> float:
        """Accumulate the gradients of a batch. -> its mean loss, times the weight"""
        total = 0.0
        for group in batch.groups:
            for part in self._parts(group):
                share = weight * (len(part.pairs) / batch.size / self._config.gradient_accumulation)
                # One after the other. Each graph is freed before the next is built, so there is memory for one only.
                for loss, shares_its_graph in losses(part):
                    loss = share * loss
                    if loss.requires_grad:  # it does not, without a reference and with a frozen token
                        torch.autograd.backward(self._scaler.scale(loss), retain_graph=shares_its_graph)
                    total += loss.item()
                    del loss
        return total

    def _parts(self, group: NoisedPairs) -> Iterator[NoisedPairs]:
        """The rows of this process, in parts of at most `max_rows`."""
        mine = range(len(group.pairs))[self._workers.rank :: self._workers.count]
        at_once = self.max_rows or len(group.pairs)
        for first in range(0, len(mine), at_once):
            yield group.rows(mine[first : first + at_once])


def _norms(vectors: Tensor) -> Tensor:
    """(n, width) -> (n, 1)"""
    return cast(Any, vectors).norm(dim=-1, keepdim=True)
