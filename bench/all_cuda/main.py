"""Measures the whole CUDA table in one run of at most ten minutes: sampling and training, full-size SD1.5 and SDXL.

    python dev.py bench all_cuda             writes bench/results/, most important figures first
    python dev.py bench all_cuda --quick     the same stages on small models, also without CUDA: a smoke run

A stage is skipped, and marked as such, if there is not enough time for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..report import Row, device_slug, environment, not_measured, print_json, publish, run_bench

MINUTES = 10.0
RESERVE = 10.0  # seconds for this script itself
SDXL_PEAK_AT_MOST_GB = 10.0
MEMORY_AT_MOST, OVER_LIMIT_AT_MOST = 1.08, 1.05
MEASURED = ("ours", "TrainLoraNode", "full fine-tune")  # the project's targets compare these
COLUMNS = ("figure", "at most", "measured", "reached")


@dataclass(frozen=True)
class Stage:
    name: str
    script: str
    geometry: str
    arguments: tuple[str, ...]
    at_least: float  # seconds; with less left, a stage is not started

    def command(self, quick: bool) -> list[str]:
        geometry = {"sd15": "narrow", "sdxl": "narrow-xl"}[self.geometry] if quick else self.geometry
        return ["--geometry", geometry, *self.arguments, *(["--quick"] if quick else [])]


STAGES = (
    Stage("sampling", "sampling", "sd15", (), at_least=60),
    Stage("training", "training", "sd15", ("--trainers", *MEASURED), at_least=120),
    Stage(
        "training sdxl",
        "training",
        "sdxl",
        ("--no-seconds", "--checkpointing", "on", "--trainers", *MEASURED[:2]),
        at_least=60,
    ),
    Stage("sampling sdxl", "sampling", "sdxl", ("--variants", "short"), at_least=60),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.quick:
        sys.exit("There is no CUDA device here, so nothing can be measured. --quick runs the stages on small models.")
    started = time.monotonic()
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for stage in STAGES:
        left = options.minutes * 60 - (time.monotonic() - started) - RESERVE
        if left < stage.at_least and not options.quick:
            results[stage.name] = not_measured("out of time")
            continue
        print(f"== {stage.name}, {left:.0f} s left", flush=True)
        begun = time.monotonic()
        command = stage.command(options.quick)
        found, why = run_bench(stage.script, *command, timeout=None if options.quick else left, echo=True)
        seconds[stage.name] = time.monotonic() - begun
        results[stage.name] = not_measured(why) if found is None else found["results"][0]
    rows = list(figures(results))
    if options.quick:
        rows = [{**row, "reached": "smoke run"} for row in rows]
    result = {
        "bench": "all_cuda",
        "seconds": time.monotonic() - started,
        "environment": environment(),
        "stages": {name: {"seconds": spent} for name, spent in seconds.items()},
        "rows": rows,
    }
    publish("all_cuda", "Everything that wants CUDA", device_slug(), result, COLUMNS, options.quick)
    print_json({**result, "results": results})


def figures(results: dict[str, Any]) -> Iterator[Row]:
    """The project's target figures: the measured value of each, or why it was not measured."""
    for name in ("sampling", "sampling sdxl"):
        rows = rows_of(results[name], "variant")
        for variant, row in rows.items():
            if variant != "plain":
                yield figure(f"{name}: {variant}, against plain", row["ratio"], row.get("at most"))
                if "kernels" in row:
                    yield figure(f"{name}: {variant}, kernels alone", row["kernels"], row.get("at most"))
        clean = rows.get("clean", {})
        missing = results[name] if isinstance(results[name], str) else not_measured("left out")
        yield figure(
            f"{name}: clean, against its multiply-adds", clean.get("ratio / limit", missing), OVER_LIMIT_AT_MOST
        )
        yield figure(f"{name}: clean, peak memory", clean.get("memory ratio", missing), MEMORY_AT_MOST)
        if not isinstance(results[name], str):
            yield figure(f"{name}: bank of one reference, MB", results[name]["bank of one reference, MB"], None)
            yield figure(f"{name}: kept after a run, MB", results[name]["kept after a run, MB"], 0.0)
    training = results["training"]
    missing = training if isinstance(training, str) else not_measured("left out")
    for switch in ("off", "on"):
        ours = rows_of(training, "trainer", checkpointing=switch).get("ours", {})
        for column, at_most in (("seconds / LoRA", 1.0), ("memory / LoRA", 0.85), ("memory / full", 0.35)):
            yield figure(f"training, checkpointing {switch}: {column}", ours.get(column, missing), at_most)
    sdxl = results["training sdxl"]
    ours = rows_of(sdxl, "trainer").get("ours", {})
    peak = ours.get("peak GB", sdxl if isinstance(sdxl, str) else not_measured("left out"))
    yield figure("training sdxl, checkpointing on: peak GB", peak, SDXL_PEAK_AT_MOST_GB)


def rows_of(result: Any, key: str, **where: str) -> dict[str, Row]:
    if isinstance(result, str):
        return {}
    return {row[key]: row for row in result["rows"] if all(row[name] == value for name, value in where.items())}


def figure(name: str, measured: Any, at_most: float | None) -> Row:
    reached = None
    if at_most is not None and isinstance(measured, float | int):
        reached = "yes" if measured <= at_most else "no"
    return {"figure": name, "at most": at_most, "measured": measured, "reached": reached}
