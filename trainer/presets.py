"""Named sets of the training node's inputs."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

AS_SET = "as set"  # every input as it is

# Number of steps, and settings for speed or likeness. Inputs that are not named keep their values.
PRESETS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        AS_SET: {},
        "quick": {"steps": 200, "rank": 8, "alpha": 8.0, "reference_mode": "clean"},
        "balanced": {"steps": 400, "rank": 16, "alpha": 16.0, "reference_mode": "clean"},
        "thorough": {"steps": 1000, "rank": 16, "alpha": 16.0, "reference_mode": "noised"},
    }
)


def with_preset(inputs: dict[str, Any], preset: str) -> dict[str, Any]:
    """Replace the inputs that the preset names. Raises ValueError for an unknown preset."""
    if preset not in PRESETS:
        raise ValueError(f"preset is '{preset}'; it is one of {', '.join(PRESETS)}.")
    return {**inputs, **PRESETS[preset]}
