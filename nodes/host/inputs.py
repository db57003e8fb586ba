"""What hosts of different age let a node say of its inputs."""

from __future__ import annotations

from collections.abc import Collection

from comfy_api.latest import io


def mark_advanced(schema: io.Schema, names: Collection[str]) -> None:
    """Let inputs be hidden until the user asks for more. Saved workflows and prompts find them where they were."""
    for given in schema.inputs:
        if given.id in names:
            # ComfyUI 0.3.75 has no argument for it, and hands on what is written here; newer ones read the attribute.
            given.extra_dict["advanced"] = True
            if hasattr(given, "advanced"):
                given.advanced = True
