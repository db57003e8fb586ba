"""The table of architectures is what people read of it, and fits what the pack makes of real classes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_page_says_what_the_table_says(comfy_host):
    from sa_inject.nodes.host.networks.architectures import ARCHITECTURES

    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for architecture in ARCHITECTURES.values():
        (row,) = re.findall(rf"^\| {re.escape(architecture.name)}[ ,|].*$", text, re.MULTILINE)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        rates = [float(rate) for rate in cells[3].split(", ")]
        assert cells[1:3] == [f"{architecture.resolution} px", f"{architecture.reference_resolution} px"]
        assert rates == [architecture.lora_learning_rate, architecture.token_learning_rate]
        assert ("experimental" in cells[4]) == architecture.is_experimental and architecture.source


def test_full_size_models_are_known_by_names_and_shapes_alone(comfy_host):
    """The host's own detection and classes, without weights: 30 and 2 layers of Z-Image, 19 and 38 of Flux.1."""
    from sa_inject.nodes.host.networks.registry import describe
    from tests.host.full_size_transformers import FULL_SIZE, on_meta

    for name, (_, _, layers) in FULL_SIZE.items():
        described = describe(on_meta(name))
        assert described.architecture == name and len(described.layers) == layers
