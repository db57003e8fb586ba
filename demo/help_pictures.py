"""Draw the pictures of the README and the help pages: the effect of the adapter, and of three settings of Apply.

    COMFYUI_PATH=.comfyui python demo/help_pictures.py [result] [strength] [start_percent] [blocks]

It trains as the demo does, on the same ComfyUI graph, and changes one setting of Apply at a time.
"""

import copy
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from PIL import Image, ImageDraw, ImageFont

from demo.run import BASE, INPUT_FOLDER, PROMPTS, SUBJECT, demo_graph, draw, with_prompt
from tests.host.client import Graph, HostClient
from tests.host.server_process import ServerProcess

log = logging.getLogger("demo")

RESULT = ROOT / "docs" / "images" / "result.webp"
HELP_PICTURES = ROOT / "web" / "docs" / "images"
PROMPT = "a large {} on the right, purple background"
SETTINGS = {
    "strength": (0.0, 0.4, 0.7, 1.0, 3.0),
    "start_percent": (0.0, 0.3, 0.6),
    "blocks": ("all", "encoder", "middle", "decoder"),
}
DEFAULTS = {("strength", 0.7), ("start_percent", 0.3), ("blocks", "all")}
CELL, GAP, LABEL = 128, 6, 22
PAPER, INK = "#ffffff", "#222222"


class Group(NamedTuple):
    """Pictures beside each other below one label."""

    label: str
    pictures: Sequence[Image.Image]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    shutil.copytree(SUBJECT, BASE / "input" / INPUT_FOLDER, dirs_exist_ok=True)
    with ServerProcess(Path(os.environ["COMFYUI_PATH"]).resolve(), BASE, {"sa-inject": ROOT}) as server:
        graph = demo_graph(server.client)
        wanted = sys.argv[1:] or ["result", *SETTINGS]
        if "result" in wanted:
            save(result_sheet(server.client, graph), RESULT)
        graph = with_input(with_prompt(graph, PROMPT), "EmptyLatentImage", "batch_size", 1)
        default = draw(server.client, graph, PROMPT).adapter[0]
        for name, values in SETTINGS.items():
            if name in wanted:
                drawn = {value: drawn_with(server.client, graph, name, value, default) for value in values}
                groups = [Group(f"{value}", [picture]) for value, picture in drawn.items()]
                save(sheet([groups]), HELP_PICTURES / f"{name}.webp")


def result_sheet(client: HostClient, graph: Graph) -> Image.Image:
    """Above, the subject's pictures. Below, for every prompt, one by the base model and one with the adapter."""
    subject = [Image.open(path) for path in sorted(SUBJECT.glob("*.png"))]
    drawn = [draw(client, with_prompt(graph, prompt), prompt) for prompt in PROMPTS]
    pairs = [Group(p.format("..."), [row.base[0], row.adapter[0]]) for p, row in zip(PROMPTS, drawn, strict=True)]
    return sheet([[Group("The subject: five pictures", subject)], pairs])


def drawn_with(client: HostClient, graph: Graph, name: str, value: object, default: Image.Image) -> Image.Image:
    log.info("%s = %s", name, value)
    if (name, value) in DEFAULTS:
        return default
    return draw(client, with_input(graph, "ApplySelfAttnInjection", name, value), PROMPT).adapter[0]


def with_input(graph: Graph, node_id: str, name: str, value: object) -> Graph:
    changed = copy.deepcopy(graph)
    for node in changed.values():
        if node["class_type"] == node_id:
            node["inputs"][name] = value
    return changed


def sheet(rows: Sequence[Sequence[Group]]) -> Image.Image:
    columns = max(sum(len(group.pictures) for group in row) for row in rows)
    picture = Image.new("RGB", (GAP + columns * (CELL + GAP), len(rows) * (LABEL + CELL + GAP)), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        x, y = GAP, number * (LABEL + CELL + GAP)
        for group in row:
            pen.text((x, y + 3), group.label, fill=INK, font=ImageFont.load_default(size=12))
            for cell in group.pictures:
                picture.paste(cell.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y + LABEL))
                x += CELL + GAP
    return picture


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=88, method=6)
    log.info("%s (%d kB)", path.relative_to(ROOT), path.stat().st_size // 1000)


if __name__ == "__main__":
    main()
