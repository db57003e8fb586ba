"""Each preset of the training node, from its first step to its last, on the demo's base model and subject.

    python dev.py bench presets                       all three
    python dev.py bench presets --presets thorough    one of them
    python dev.py bench presets --quick               two steps of each

Samples are drawn four times and at the start. Their sheet is written beside the table. All other inputs are the node's
defaults but for the resolution, which is the base model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..host import CACHE, RESULTS, demo_checkpoint, start_host, use_demo
from ..report import Row, environment, print_json, publish

COLUMNS = (
    "preset",
    "steps",
    "loss, first tenth",
    "loss, last tenth",
    "validation, first",
    "validation, last",
    "minutes",
)
PROMPT = "a large [trigger] toy on the left, red background"
NAMES = ("quick", "balanced", "thorough")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    host = start_host()
    parts = _checkpoint()
    if options.quick:
        from sa_inject.trainer import presets

        presets.PRESETS = MappingProxyType({name: {**given, "steps": 2} for name, given in presets.PRESETS.items()})
    rows = []
    for name in options.presets:
        rows.append(trained(host, parts, name, CACHE if options.quick else RESULTS / "presets"))
        print(f"  {rows[-1]}", flush=True)
    result = {"bench": "presets", "geometry": "demo", "environment": environment(), "rows": rows}
    stem = "demo-cpu" if len(rows) == len(NAMES) else f"demo-cpu-{'-'.join(options.presets)}"
    publish("presets", "The presets on the demo's base model", stem, result, COLUMNS, options.quick)
    print_json(result)


def trained(host: Any, parts: dict[str, Any], preset: str, folder: Path) -> Row:
    """Train with it, and save the sheet of all samples."""
    from PIL import Image

    from sa_inject.trainer.presets import PRESETS

    steps = PRESETS[preset]["steps"]
    (settings,) = host.execute("SAInjectTrainingSettings", sample_every=max(steps // 4, 1), sample_prompts=PROMPT)
    begun = time.monotonic()
    found = host.execute(
        "TrainSAInjectAdapter",
        **parts,
        **_subject(),
        settings=settings,
        preset=preset,
        resolution=128,
        previews=0,
        file_name=f"preset-{preset}",
    )
    seconds = time.monotonic() - begun
    (summary,) = found.ui["sa_inject_training"]
    assert summary["phase"] == "done", summary["text"]
    losses, tenth = found[2]["loss"], max(steps // 10, 1)
    assert len(losses) == steps
    measured = [point[3] for point in summary["points"] if point[3] is not None]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((found[4][0] * 255).round().byte().numpy()).save(folder / f"{preset}.png")
    return {
        "preset": preset,
        "steps": steps,
        "loss, first tenth": statistics.mean(losses[:tenth]),
        "loss, last tenth": statistics.mean(losses[-tenth:]),
        "validation, first": measured[0],
        "validation, last": measured[-1],
        "minutes": seconds / 60,
    }


def _subject() -> dict[str, Any]:
    """The demo's pictures and captions, under its word."""
    use_demo()
    import numpy as np
    import torch
    from PIL import Image

    from demo import run

    files = sorted(run.SUBJECT.glob("*.png"))
    pictures = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float()[None] / 255 for file in files]
    return {
        "images": pictures,
        "captions": [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files],
        "placeholder_token": run.PLACEHOLDER,
        "class_word": run.CLASS_WORD,
    }


def _checkpoint() -> dict[str, Any]:
    import comfy.sd
    import torch

    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(demo_checkpoint()))
    return {"model": model, "clip": clip, "vae": vae}


if __name__ == "__main__":
    main()
