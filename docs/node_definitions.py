"""The English texts of the nodes, `locales/en/nodeDefs.json`, from their schemas. Other locales translate them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json"


def text_of(schemas: Mapping[str, Any]) -> str:
    """The file's text. `schemas` are ComfyUI's `io.Schema`, by the node's id."""
    definitions = {
        node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {one.id: {"name": one.id, "tooltip": one.tooltip} for one in schema.inputs},
            "outputs": {
                str(place): {"name": one.display_name, "tooltip": one.tooltip}
                for place, one in enumerate(schema.outputs)
            },
        }
        for node_id, schema in schemas.items()
    }
    return json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"
