"""Identity by both judges on one scale. 0: the base model's picture of the class word. 1: another real scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..report import Row
from .results import Result
from .scores import bootstrap

FLOOR, CEILING = "base", "real scenes, moved"
REAL = ("real scenes", "real, autoencoded", CEILING)  # pictures that no method has drawn
JUDGES = ("similarity", "imagenet", "colour")
COLUMNS = ("method", "subjects", *(name for judge in JUDGES for name in (judge, f"{judge}, relative")))


def both_rows(results: Sequence[Result], said_of: Callable[[Result], Result | None]) -> list[Row]:
    """Over the subjects of each method that both judges have scored, with floor and ceiling."""
    seen: dict[str, dict[str, Result]] = {}
    for result in results:
        said = said_of(result)
        if said is not None:
            values = {
                "similarity": result["scores"]["similarity"],
                "imagenet": said["imagenet"],
                "colour": said["colour"],
            }
            seen.setdefault(result["key"]["method"], {})[result["key"]["subject"]] = values
    floor, ceiling = seen.get(FLOOR, {}), seen.get(CEILING, {})
    rows: list[Row] = []
    for method, subjects in seen.items():
        common = sorted(subjects.keys() & floor.keys() & ceiling.keys())
        if not common:
            continue
        row: Row = {"method": method, "subjects": len(common)}
        for judge in JUDGES:
            value, low, high = ([found[subject][judge] for subject in common] for found in (subjects, floor, ceiling))
            row[judge] = f"{sum(value) / len(value):.3f}"
            row[f"{judge}, relative"] = "{:.3f} ({:.3f} to {:.3f})".format(*bootstrap(relative(value, low, high)))
        rows.append(row)
    return rows


def relative(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[float]:
    """From each subject's own floor, by the mean distance to the ceiling: some subjects have almost no distance of
    their own.
    """
    span = sum(b - a for a, b in zip(low, high, strict=True)) / len(low)
    return [(value - a) / span for value, a in zip(values, low, strict=True)]
