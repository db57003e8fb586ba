"""The adapter: LoRA for the reference pass, the learned word, and the text that the reference pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from .image_prompt import TextConditioning
from .kv import BlockKey
from .layers import SelfAttentionLayer
from .lora import SelfAttentionLoRA
from .positions import PositionRule

ReferenceMode = Literal["clean", "noised"]
REFERENCE_MODES: tuple[str, ...] = get_args(ReferenceMode)

PREDICTION_TYPES = ("eps", "v_prediction", "edm", "x0", "flow")


class AdapterMismatchError(ValueError):
    """An adapter and a model that do not belong together."""


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, apart from its tensors."""

    architecture: str  # the family of the base model in words, "SD1.x"
    layers: tuple[SelfAttentionLayer, ...]
    rank: int
    alpha: float
    reference_mode: ReferenceMode
    placeholder_token: str
    class_word: str
    training: dict[str, Any] = field(default_factory=dict[str, Any])  # settings of the run, for people to read
    positions: PositionRule = "none"  # between a picture and its references, in networks that have positions


@dataclass
class Adapter:
    """A learned subject.

    `token_embedding` holds the learned word's vectors for every text encoder: "clip_l" -> (vectors, width).
    `class_conditioning` is the encoded class word, read by the reference pass unless the image prompt has a text.
    """

    name: str
    info: AdapterInfo
    lora: SelfAttentionLoRA
    token_embedding: dict[str, Tensor]
    class_conditioning: TextConditioning

    def blocks(self) -> tuple[BlockKey, ...]:
        return tuple(layer.key for layer in self.info.layers)

    def check_fits(
        self, architecture: str, layers: Sequence[SelfAttentionLayer], prediction_type: str | None = None
    ) -> None:
        """Refuse a model of another shape, or one that predicts something else.

        Raises AdapterMismatchError, which names both.

        What a model predicts is known by names such as "eps" and "v_prediction"; where one is not known, any will do.
        """
        if architecture != self.info.architecture or tuple(layers) != self.info.layers:
            raise AdapterMismatchError(
                f"Adapter '{self.name}' was trained for {self.info.architecture} "
                f"({len(self.info.layers)} self-attention layers), but the connected model is {architecture} "
                f"({len(layers)}). Connect a {self.info.architecture} checkpoint like the one it was trained on, or "
                "choose another adapter."
            )
        trained = self.info.training.get("prediction_type")
        if trained in PREDICTION_TYPES and prediction_type in PREDICTION_TYPES and trained != prediction_type:
            raise AdapterMismatchError(
                f"Adapter '{self.name}' was trained on a model that predicts {trained}, but the connected "
                f"{architecture} model predicts {prediction_type}. Connect a checkpoint like the one it was trained "
                "on. Where ComfyUI takes the checkpoint for another kind, put ModelSamplingDiscrete before this node."
            )
