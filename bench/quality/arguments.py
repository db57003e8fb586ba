"""The arguments of the quality bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..host import CACHE, RESULTS

SWEPT_WITH: dict[str, Any] = {"sampler_steps": 10, "cfg": 3.0, "sampler": "dpmpp_2m", "scheduler": "karras"}
NEXTDIT_SAMPLING: dict[str, Any] = {"sampler_steps": 20, "cfg": 4.0, "sampler": "euler", "scheduler": "simple"}


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("rates", "choices", "main", "ablations", "time")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--methods", nargs="+", help="only these of the table")
    parser.add_argument("--ablations", nargs="+", help="only these of the ablations and choices")
    parser.add_argument("--rates", nargs="+", type=pair, metavar="RATE,WORD", help="instead of those of the sweep")
    parser.add_argument(
        "--subjects", type=int, help="main: 12, on CUDA 40; ablations: 6 and 20; choices: 3 and 12; time: 2 and 12"
    )
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of every method")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--network", type=Path, help="a training run's folder: its NextDiT is the base model")
    parser.add_argument("--sampler-steps", type=int, help="10; of a NextDiT 20")
    parser.add_argument("--sampler", help="dpmpp_2m; of a NextDiT euler")
    parser.add_argument("--scheduler", help="karras; of a NextDiT simple")
    parser.add_argument("--cfg", type=float, help="3; of a NextDiT 4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16; on a CPU float32")
    parser.add_argument("--share", type=share, default=(0, 1), metavar="I/N", help="every Nth result, from the Ith on")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for name, value in (SWEPT_WITH if options.network is None else NEXTDIT_SAMPLING).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.quick:
        options.steps, options.sampler_steps, options.subjects = 3, 3, 1
    # Only some processors multiply in bfloat16. The others are a hundred times slower with it.
    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return options


def results_folder(options: argparse.Namespace) -> Path:
    name = "quality" if options.network is None else "quality-nextdit"
    return (CACHE if options.quick else RESULTS) / name


def share(text: str) -> tuple[int, int]:
    """The part of the work for this process: "2/8" is the third of eight."""
    own, count = map(int, text.split("/"))
    if not 0 <= own < count:
        raise ValueError
    return own, count


def pair(text: str) -> tuple[float, float]:
    """A LoRA rate and a token rate: "1e-3,2e-3"."""
    rate, word = map(float, text.split(","))
    return rate, word
