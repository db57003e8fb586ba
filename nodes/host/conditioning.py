"""ComfyUI's CONDITIONING, read as text for the reference pass."""

from __future__ import annotations

from typing import Any

from ...core.image_prompt import ReferenceText


def reference_text(conditioning: list[Any]) -> ReferenceText:
    """Take the first entry of a CONDITIONING. Raises ValueError when it is empty."""
    if not conditioning:
        raise ValueError("The conditioning is empty. Connect the output of a CLIPTextEncode, or leave it open.")
    cross_attn, options = conditioning[0]
    pooled = options.get("pooled_output")
    return ReferenceText(cross_attn[:1], None if pooled is None else pooled[:1])
