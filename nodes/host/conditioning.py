"""Convert ComfyUI's CONDITIONING to text for the reference pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...core.image_prompt import TextConditioning

if TYPE_CHECKING:
    from .host_types import Conditioning

log = logging.getLogger(__name__)

# Entries of a conditioning that are not used: ComfyUI's key, and the name that users know.
NOT_READ = {
    "area": "area",
    "mask": "mask",
    "control": "ControlNet",
    "gligen": "GLIGEN",
    "hooks": "LoRA hooks",
    "start_percent": "timestep range",
    "end_percent": "timestep range",
    "unclip_conditioning": "unCLIP picture",
    "concat_latent_image": "inpainting picture",
}


def reference_texts(conditionings: Sequence[Conditioning], pictures: int, node: str) -> list[TextConditioning | None]:
    """One text for each picture, from none, one for all, or one for each. Raises ValueError for other counts."""
    if not conditionings:
        return [None] * pictures
    if len(conditionings) not in (1, pictures):
        raise ValueError(
            f"{node}: there are {len(conditionings)} conditionings for {pictures} pictures. Connect one for all, or "
            f"one for each."
        )
    texts = [reference_text(conditioning) for conditioning in conditionings]
    return texts * pictures if len(texts) == 1 else texts


def reference_text(conditioning: Conditioning) -> TextConditioning:
    """The text of a CONDITIONING. Raises ValueError if there is none or more than one."""
    if not conditioning:
        raise ValueError("The conditioning is empty. Connect the output of a CLIPTextEncode, or leave it open.")
    if len(conditioning) > 1:
        raise ValueError(
            f"The conditioning has {len(conditioning)} entries, as after Conditioning (Combine), but a picture is read "
            f"with one text. Use Conditioning (Concat), or connect one CLIPTextEncode."
        )
    cross_attn, options = conditioning[0]
    ignored = sorted({name for key, name in NOT_READ.items() if options.get(key) is not None})
    if ignored:
        log.warning(
            "SA-Inject reads only the text of the conditioning at Encode Image Prompt, not its %s.", ", ".join(ignored)
        )
    pooled = options.get("pooled_output")
    return TextConditioning(_only_row(cross_attn), None if pooled is None else _only_row(pooled))


def _only_row(text: Tensor) -> Tensor:
    if any(not row.equal(text[0]) for row in text[1:]):
        raise ValueError(
            f"The conditioning holds a batch of {len(text)} texts, but a picture is read with one. Connect one "
            f"CLIPTextEncode, or a list of conditionings, one for each picture."
        )
    return text[:1]
