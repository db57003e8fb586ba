"""Likeness against seconds of training: after how long does a method look like the subject?"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..report import Row, not_measured
from .results import Result, ResultStore

if TYPE_CHECKING:
    from .main import Bench

SUBJECTS = {"cpu": 2, "cuda": 12}
STEPS = {"cpu": (10, 25, 50, 100, 200), "cuda": (10, 25, 50, 100, 200, 400, 800)}
METHODS = ("textual inversion", "TrainLoraNode", "PEFT LoRA", "full fine-tune", "ours, noised", "ours, clean")
TIME_COLUMNS = ("method", "steps", "subjects", "seconds", "similarity", "imagenet")


def measure(bench: Bench) -> None:
    """Train each method for each number of steps, anew, because averages depend on the number."""
    from .methods import timed
    from .subjects import make_subject, table_artworks
    from .task import TrainingTask

    options = bench.options
    prompts, steps = (2, (1, 3)) if options.quick else (25, STEPS[bench.kind])
    methods = {name: method for name, method in bench.methods().items() if name in METHODS}
    at, warm = copy.copy(bench), set[str]()
    for artwork in table_artworks(options.subjects or SUBJECTS[bench.kind]):
        subject = make_subject(artwork, prompts=prompts)
        for name, method in methods.items():
            rates = bench.best_rates(method.swept_as or name)
            if name not in warm:  # not counted: a method's first training in a process also loads and compiles
                one_step = bench.settings._replace(steps=1)
                timed(TrainingTask(bench.host, bench.models, subject, one_step, *rates), method)
                warm.add(name)
            for count in steps:
                at.settings = bench.settings._replace(steps=count)
                at.result("time", name, rates, method.train, subject, pictures=1, base_objects=0)


def time_rows(results: ResultStore, base: str, settings: Any, said_of: Callable[[Result], Result | None]) -> list[Row]:
    """Means over subjects of each method after each number of steps. All other settings are those given."""
    cells: dict[tuple[str, int], list[Result]] = {}
    for result in results.all():
        key = result["key"]
        steps = key["settings"]["steps"]
        if (key["part"], key["base"], key["settings"]) == ("time", base, settings._replace(steps=steps)._asdict()):
            cells.setdefault((key["method"], steps), []).append(result)
    rows: list[Row] = []
    for (method, steps), found in sorted(cells.items()):
        said = [look["imagenet"] for look in map(said_of, found) if look is not None]
        row: Row = {"method": method, "steps": steps, "subjects": len(found)}
        row["seconds"] = statistics.median(result["training_seconds"] for result in found)
        row["similarity"] = statistics.fmean(result["scores"]["similarity"] for result in found)
        is_judged = len(said) == len(found)
        row["imagenet"] = statistics.fmean(said) if is_judged else not_measured("not by the second judge")
        rows.append(row)
    return rows
