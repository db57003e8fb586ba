"""Options of inputs that differ between versions of the host."""

from __future__ import annotations

from collections.abc import Collection

from comfy_api.latest import io


def mark_advanced(schema: io.Schema, names: Collection[str]) -> None:
    """Mark inputs as advanced, so that the frontend hides them at first. Saved workflows are not affected."""
    for given in schema.inputs:
        if given.id in names:
            # ComfyUI 0.3.75 has no argument for it, but passes on this dictionary. Newer versions read the attribute.
            given.extra_dict["advanced"] = True
            if hasattr(given, "advanced"):
                given.advanced = True
