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
    """What one optimizer step reports."""

    number: int  # counts from 1
    loss: float
    gradient_norm: float | None = None  # before it is clipped; None where nothing has a gradient


# Batches in a row whose scaled gradients overflow before it is called more than a scale that has to be found: halved so
# often, the first scale of 65536 is far below 1.
OVERFLOWS_IN_A_ROW = 24


class DivergedError(RuntimeError):
    """The loss, or every gradient, is no longer a number."""


class Training(Iterator[Step]):
    """A run that trains in place, one optimizer step at a time; wherever it stops, what there is is a usable adapter.

    `apply_average` is for the end: it puts the average of what the steps came to in the place of what the last one did.
    `state_dict` is all that another run over the same things needs to go on as this one would have, bit for bit.
    `max_rows` is how many pairs are denoised at once, None for a whole batch: less memory, and the same step but for
    rounding. It may change between steps.
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
        """`reference_caption` is what the reference pass reads: without the learned word, so that it is encoded only
        once. `workers` are the processes that share every batch, given the same of everything else."""
        self.losses: list[float] = []  # of every step that is done
        self._gradient_norm: float | None = None
        self.overflows = 0  # batches that gave no step, for their gradients overflowed in float16
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
        self._random_state = self._batches.state()  # as the last whole step left it
        self._optimizer = build_optimizer(config, lora.parameters(), self._tokens)
        self._schedule = build_schedule(self._optimizer, config)
        self._scaler = GradScaler(device.type, enabled=config.loss_scaling)
        self._scale = self._scaler.state_dict()  # as the last whole step left it

    def __next__(self) -> Step:
        """Take a step. Raises Diverged at the first loss that is not finite, and has not taken the step then.

        A batch whose scaled gradients overflow is no step: the next one is tried, at a lower scale.
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
        """Change what learns by its gradients, and drop those. -> whether they were numbers

        Raises Diverged, and changes nothing then, where they are none though nothing scales them.
        """
        config = self._config
        if all(parameter.grad is None for parameter in self._trainables):
            self._optimizer.step()  # of nothing: a word alone that does not learn
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
        """Scale every vector of the word to the length that it began with, where that is wanted.

        An embedding that grows drowns the rest of a prompt.
        """
        if not self._config.options.keep_token_norm:
            return
        with torch.no_grad():
            for token, norm in zip(self._tokens, self._token_norms, strict=True):
                token.mul_(norm / _norms(token).clamp(min=torch.finfo(token.dtype).tiny))

    @property
    def reference_text(self) -> TextConditioning:
        """What the reference pass reads, encoded; it is the same from the first step to the last."""
        return self._losses.reference_text

    def apply_average(self) -> None:
        """Let the trainables be their average over the steps, where one is kept."""
        if self._average is not None:
            self._trainables.load_state_dict(self._average.module.state_dict())
            self._restore_token_norms()

    @contextlib.contextmanager
    def averaged(self) -> Generator[None]:
        """Let the trainables be what `apply_average` makes of them, for as long as this lasts."""
        before = [parameter.detach().clone() for parameter in self._trainables]
        try:
            if self.losses:  # before the first step there is nothing to average
                self.apply_average()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._trainables, before, strict=True):
                    parameter.copy_(value)

    def rewind(self) -> None:
        """Drop what a step that failed has drawn and added up, as if it had not begun."""
        self._batches.restore(self._random_state)
        self._scaler.load_state_dict(self._scale)
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def loss_of(self, group: NoisedPairs) -> float:
        """Mean loss of pairs that have one shape, from which nothing is learned."""
        learns = self._losses.trains_token_embedding
        self._losses.trains_token_embedding = True  # no text is kept for the steps: an average may be measured
        try:
            parts = ((next(iter(self._losses.of_pairs(part))), len(part.pairs)) for part in self._parts(group))
            return sum(loss.value.item() * rows for loss, rows in parts) / len(group.pairs)
        finally:
            self._losses.trains_token_embedding = learns

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Of the LoRA and of the word in the next step; Prodigy's as it has estimated them so far."""
        lora, tokens = (group["lr"] * group.get("d", 1.0) for group in self._optimizer.param_groups)
        return lora, tokens if self._losses.trains_token_embedding else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where the last whole step left everything: numbers, lists and tensors, as torch.load(weights_only=True)
        takes them. The tensors are the live ones: save or copy them before the next step."""
        return {
            "losses": list(self.losses),
            "trainables": self._trainables.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scale,
            "generator": self._random_state.generator,
            "waiting": list(self._random_state.waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Only for a run over the same pictures, with the same settings but `steps`."""
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
        self._optimizer.zero_grad(set_to_none=True)  # of a step that failed half-way

    def _accumulate_gradients(self) -> float:
        """Add up the gradients of this process's part of one batch, and of as many class pictures; its loss."""
        total = self._backward(self._batches.draw(), 1.0, self._losses.of_pairs)
        if self._uses_class_pictures:
            weight = self._config.options.prior_weight
            total += self._backward(self._batches.draw_class_pictures(), weight, self._losses.of_class_pairs)
        return total

    def _backward(self, batch: Batch, weight: float, losses: Callable[[NoisedPairs], Iterator[Loss]]) -> float:
        """Add up the gradients of a batch; its mean loss, times the weight."""
        total = 0.0
        for group in batch.groups:
            for part in self._parts(group):
                share = weight * (len(part.pairs) / batch.size / self._config.gradient_accumulation)
                # One after the other, and each graph is gone before the next is built: memory for one is enough.
                for loss, shares_its_graph in losses(part):
                    loss = share * loss
                    if loss.requires_grad:  # not without a reference where the word does not learn
                        torch.autograd.backward(self._scaler.scale(loss), retain_graph=shares_its_graph)
                    total += loss.item()
                    del loss
        return total

    def _parts(self, group: NoisedPairs) -> Iterator[NoisedPairs]:
        """The rows that are this process's to compute, as many at once as there may be."""
        mine = range(len(group.pairs))[self._workers.rank :: self._workers.count]
        at_once = self.max_rows or len(group.pairs)
        for first in range(0, len(mine), at_once):
            yield group.rows(mine[first : first + at_once])


def _norms(vectors: Tensor) -> Tensor:
    """(n, width) -> (n, 1)"""
    return cast(Any, vectors).norm(dim=-1, keepdim=True)
