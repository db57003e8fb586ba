"""The adapter: LoRA for the reference pass, the token embedding, and the class conditioning.

Papers: LoRA (Hu et al., 2021, arXiv 2106.09685) and Textual Inversion (Gal et al., 2022, arXiv 2208.01618).
"""

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
    """An adapter and a model that do not fit. The message names both."""


@dataclass(frozen=True)
class AdapterInfo:
    """The description of an adapter: everything but its tensors. A file stores it as metadata."""

    architecture: str  # the family of the base model, such as "SD1.x"
    layers: tuple[SelfAttentionLayer, ...]
    rank: int
    alpha: float
    reference_mode: ReferenceMode
    placeholder_token: str
    class_word: str
    training: dict[str, Any] = field(default_factory=dict[str, Any])  # settings of the run, for information
    positions: PositionRule = "none"  # how references are positioned, in networks with position embeddings


@dataclass
class Adapter:
    """A trained adapter for one subject.

    `token_embedding` maps each text encoder to the vectors of the placeholder token: "clip_l" -> (vectors, width).
    `class_conditioning` is the encoded class word. The reference pass reads it if the image prompt has no text.
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
        """Check that a model has the adapter's layers and predicts the same quantity.

        Raises AdapterMismatchError. Prediction types are compared only if both are in PREDICTION_TYPES.
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
