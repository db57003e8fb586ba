"""The training loop: LoRA and token embedding together, from the first step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..core.image_prompt import TextConditioning, stack_conditionings
from ..core.lora import SelfAttentionLoRA
from .config import TrainConfig
from .denoiser import Denoiser
from .examples import Example, Pair, TrainingSet, group_by_shape
from .objective import prediction_loss


class Step(NamedTuple):
    """What one optimizer step reports."""

    number: int  # counts from 1
    loss: float


# Batches in a row whose scaled gradients overflow before it is called more than a scale that has to be found: halved so
# often, the first scale of 65536 is far below 1.
OVERFLOWS_IN_A_ROW = 24


class DivergedError(RuntimeError):
    """The loss, or every gradient, is no longer a number."""


class Training(Iterator[Step]):
    """A run that trains in place, one optimizer step at a time; wherever it stops, what there is is a usable adapter.

    `apply_average` is for the end: it puts the average of what the steps came to in the place of what the last one did.
    `state_dict` is all that another run over the same things needs to go on as this one would have, bit for bit.
    """

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
    ) -> None:
        """`reference_caption` is what the reference pass reads: without the learned word, so that it is encoded only
        once."""
        self.losses: list[float] = []  # of every step that is done
        self.overflows = 0  # batches that gave no step, for their gradients overflowed in float16
        self._denoiser = denoiser
        self._lora = lora
        self._config = config
        self._device = device
        self._compute_dtype = compute_dtype
        self._create_trainables = nn.ParameterList([*lora.parameters(), *tokens])
        self._average = (
            None if config.average_power is None else PolynomialAverage(self._create_trainables, config.average_power)
        )
        self._trains_token_embedding = config.token_learning_rate > 0
        for token in tokens:
            token.requires_grad_(self._trains_token_embedding)
        self._texts: dict[str, TextConditioning] = {}  # of captions, where the word does not learn
        self._sigmas = denoiser.sigmas.cpu()  # ascending
        with torch.no_grad():
            self._reference_text = denoiser.encode([reference_caption])
        self._generator = torch.Generator().manual_seed(config.seed)
        self._pairs = data.pairs(config.reference_dropout, self._generator)
        self._rng_state = self._capture_rng_state()  # as the last whole step left it
        self._optimizer = torch.optim.AdamW(
            [
                {"params": lora.parameters(), "lr": config.lora_learning_rate, "weight_decay": config.weight_decay},
                {"params": list(tokens), "lr": config.token_learning_rate, "weight_decay": 0.0},
            ]
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.loss_scaling)
        self._scale = self._scaler.state_dict()  # as the last whole step left it

    def __next__(self) -> Step:
        """Take a step. Raises Diverged at the first loss that is not finite, and has not taken the step then.

        A batch whose scaled gradients overflow is no step: the next one is tried, at a lower scale.
        """
        if len(self.losses) >= self._config.steps:
            raise StopIteration
        number = len(self.losses) + 1
        for _ in range(OVERFLOWS_IN_A_ROW):
            loss = sum(self._accumulate_gradients() for _ in range(self._config.gradient_accumulation))
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
        if self._average is not None:
            self._average.update_parameters(self._create_trainables)
        self._rng_state, self._scale = self._capture_rng_state(), self._scaler.state_dict()
        return Step(number, loss)

    def _optimize(self, number: int) -> bool:
        """Change what learns by its gradients, and drop those. -> whether they were numbers

        Raises Diverged, and changes nothing then, where they are none though nothing scales them.
        """
        config = self._config
        if all(parameter.grad is None for parameter in self._create_trainables):
            return True  # a word alone that does not learn
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._create_trainables, config.max_gradient_norm)
        is_finite = bool(torch.isfinite(norm))
        if not (is_finite or config.loss_scaling):
            raise DivergedError(f"The gradient became {norm.item()} at step {number}. Lower the learning rates.")
        if is_finite:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return is_finite

    @property
    def reference_text(self) -> TextConditioning:
        """What the reference pass reads, encoded; it is the same from the first step to the last."""
        return self._reference_text

    def apply_average(self) -> None:
        """Let the trainables be their average over the steps, where one is kept."""
        if self._average is not None:
            self._create_trainables.load_state_dict(self._average.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where the last whole step left everything: numbers, lists and tensors, as torch.load(weights_only=True)
        takes them. The tensors are the live ones: save or copy them before the next step."""
        random, waiting = self._rng_state
        return {
            "losses": list(self.losses),
            "trainables": self._create_trainables.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scale,
            "generator": random,
            "waiting": list(waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Only for a run over the same pictures, with the same settings but `steps`."""
        self._create_trainables.load_state_dict(state["trainables"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._scale = state["scaler"]
        self._generator.set_state(state["generator"])
        self._pairs.waiting = list(state["waiting"])
        self.losses = list(state["losses"])
        self._rng_state = self._capture_rng_state()

    def _capture_rng_state(self) -> tuple[Tensor, list[int]]:
        return self._generator.get_state(), list(self._pairs.waiting)

    def _accumulate_gradients(self) -> float:
        """Add up the gradients of one batch; its loss."""
        config, total = self._config, 0.0
        batch = list(itertools.islice(self._pairs, config.batch_size))
        levels = torch.randint(len(self._sigmas), (len(batch),), generator=self._generator)  # uniform, as the model's
        batch = _drop_references_at_high_noise(batch, levels, (1 - config.reference_start) * len(self._sigmas))
        for places in group_by_shape(batch):
            group, sigma = [batch[place] for place in places], self._sigmas[levels[places]].to(self._device)
            share = len(group) / len(batch) / config.gradient_accumulation
            loss = share * self._group_loss(group, sigma)
            if loss.requires_grad:  # not without a reference where the word does not learn
                self._scaler.scale(loss).backward()
            total += loss.item()
        return total

    def _group_loss(self, group: Sequence[Pair], sigma: Tensor) -> Tensor:
        """Mean loss of pairs that have one shape, noised to sigma (b,). -> ()"""
        denoiser, device = self._denoiser, self._device
        targets = [pair.target for pair in group]
        captions = [pair.caption for pair in group]
        references = [pair.reference for pair in group if pair.reference is not None]
        latent = _stack(targets, device)  # (b, c, h, w)
        noisy = denoiser.add_noise(latent, self._noise_like(latent), sigma)

        bank = None
        if references:
            bank = denoiser.read_reference(
                *self._reference_input(references, sigma),
                text=_repeat(self._reference_text, len(group)),
                mask=_stack_masks(references, device),
                deltas=self._lora.deltas(device, self._compute_dtype),
            )
        denoised = denoiser.denoise(noisy, sigma, self._encode_captions(captions), bank)
        mask, scale = _stack_masks(targets, device), denoiser.output_scale(sigma)
        return prediction_loss(denoised, latent, scale, None if mask is None else mask[:, None]).mean()

    def _encode_captions(self, captions: Sequence[str]) -> TextConditioning:
        """Captions as the text encoder reads them, a row each; where the word does not learn, each only once."""
        if self._trains_token_embedding:
            return self._denoiser.encode(captions)
        with torch.no_grad():
            for caption in captions:
                if caption not in self._texts:
                    self._texts[caption] = self._denoiser.encode([caption])
        return stack_conditionings([self._texts[caption] for caption in captions])

    def _reference_input(self, references: Sequence[Example], sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        latent = _stack(references, self._device)
        if self._config.reference_mode == "clean":
            return latent, None
        # Noise of its own: shared noise would tell the model where the reference's details go.
        return self._denoiser.add_noise(latent, self._noise_like(latent), sigma), sigma

    def _noise_like(self, latent: Tensor) -> Tensor:
        return torch.randn(latent.shape, generator=self._generator).to(latent)


class PolynomialAverage(AveragedModel):
    """Polynomial-decay averaging (Shamir and Zhang, 2013, section 4): step t counts about as t to that power.

    With a high learning rate the steps go around what they look for, and their average is nearer to it than the last.
    """

    def __init__(self, trainables: nn.ParameterList, power: float) -> None:
        def averaged(average: Tensor, parameter: Tensor, count: Tensor | int) -> Tensor:
            return average.lerp(parameter, (power + 1) / (power + 1 + int(count)))

        super().__init__(trainables, avg_fn=averaged)


def _drop_references_at_high_noise(batch: Sequence[Pair], levels: Tensor, first: float) -> list[Pair]:
    """Let the word stand alone at noise levels from `first` on, which a sampler goes through first."""
    return [
        pair if level < first else pair._replace(reference=None)
        for pair, level in zip(batch, levels.tolist(), strict=True)
    ]


def _stack(examples: Sequence[Example], device: torch.device) -> Tensor:
    return torch.cat([example.latent for example in examples]).to(device, torch.float32)  # (b, c, h, w)


def _stack_masks(examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """Masks where there are any, ones for the pictures without. -> (b, h, w) or None"""
    if all(example.mask is None for example in examples):
        return None
    masks = [torch.ones(example.latent.shape[-2:]) if example.mask is None else example.mask for example in examples]
    return torch.stack(masks).to(device, torch.float32)


def _repeat(text: TextConditioning, rows: int) -> TextConditioning:
    cross_attn, pooled, lengths = text
    return TextConditioning(
        cross_attn.expand(rows, *cross_attn.shape[1:]),
        None if pooled is None else pooled.expand(rows, *pooled.shape[1:]),
        None if lengths is None else lengths * rows,
    )
