"""The results of the quality bench so far, as tables, plots, pictures and one JSON object."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..report import Row, environment, table
from .both_judges import COLUMNS as BOTH_COLUMNS
from .both_judges import REAL, both_rows
from .over_time import TIME_COLUMNS, time_rows
from .report_pictures import grid
from .report_plots import plot, plot_time
from .results import Result, ResultStore, by_method, harmonics, mean
from .scores import bootstrap, paired

OURS = ("ours, clean", "ours, noised", "ours, clean, strength 1", "ours, noised, strength 1")
FULL = "full fine-tune"
BEATEN = ("TrainLoraNode", "PEFT LoRA", "textual inversion")
MARGIN = -0.02  # ours is "not worse" if the lower bound of the difference is above this
ENOUGH = 12  # subjects that a claim needs
COLUMNS = (
    "method",
    "subjects",
    "similarity",
    "top-1",
    "fidelity",
    "harmonic",
    "copying",
    "forgetting",
    "loss",
    "parameters",
    "file MB",
    "training s",
    "memory MB",
    "s / image",
)
CHANGE_COLUMNS = ("changed", "subjects", "similarity", "top-1", "fidelity", "harmonic", "difference", "copying")
VERDICT_COLUMNS = ("of", "against", "subjects", "difference", "asked for", "reached")
RATE_COLUMNS = ("method", "rates", "subjects", "harmonic")


def results_of(results: ResultStore, part: str, base: str, settings: Any) -> list[Result]:
    """All results of one part with this base model and these settings."""
    wanted = {"part": part, "base": base, "settings": settings._asdict()}
    return [result for result in results.all() if wanted.items() <= result["key"].items()]


def report(
    results: ResultStore,
    folder: Path,
    base: str,
    settings: Any,
    quick: bool,
    said_of: Callable[[Result], Result | None] = lambda result: None,
) -> dict[str, Any]:
    """Write tables, plots and grids to the folder. -> the JSON object of the bench's last line"""
    found = {part: results_of(results, part, base, settings) for part in ("rates", "choices", "main", "ablations")}
    whole = of_whole_subjects(found["main"])
    rows = main_rows(whole)
    changes, choices = (ablation_rows(found[part]) for part in ("ablations", "choices"))
    verdict = judged(found["main"])
    both = both_rows(whole, said_of)
    timed = time_rows(results, base, settings, said_of)
    others = with_other_settings(results, base, settings)
    result = {
        "bench": "quality",
        "settings": settings._asdict(),
        "base": base,
        "environment": environment(),
        "rows": rows,
        "ablations": changes,
        "choices": choices,
        "rates": rate_rows(found["rates"]),
        "verdict": verdict,
        "both judges": both,
        "time": timed,
        "other settings": others,
    }
    tables = (
        ("Methods: means over subjects, 95 % intervals", rows, COLUMNS),
        (
            "Identity by both judges: 0 is the base's picture of the class word, 1 another real scene",
            both,
            BOTH_COLUMNS,
        ),
        ("Ours against the others: paired difference of the harmonic mean", verdict, VERDICT_COLUMNS),
        ("Ours with one thing changed, at the strength that was trained", changes, CHANGE_COLUMNS),
        ("The same on the subjects that defaults are chosen on", choices, CHANGE_COLUMNS),
        ("Learning rates: harmonic mean on subjects of their own", result["rates"], RATE_COLUMNS),
        ("Likeness after more and more steps: one picture of each prompt", timed, TIME_COLUMNS),
    )
    sections = [(title, table(measured, columns)) for title, measured, columns in tables if measured]
    sections += [(f"With {other['what']}", shown_otherwise(other)) for other in others]
    text = "\n\n".join(f"## {title}\n\n{shown}" for title, shown in sections)
    print(text, flush=True)
    facts = "\n".join(
        f"- {name}: {value}"
        for name, value in {
            **settings._asdict(),
            **result["environment"],
            "base": base,
            "subjects of the first table": "those that most methods have learned",
            "subjects of the second table": "all that both have learned",
            "seconds and memory of the first table": timed_on(whole),
        }.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "quality.md").write_text(f"# Quality\n\n{text}\n\n## How it was measured\n\n{facts}\n", encoding="utf-8")
    if timed:
        plot_time(timed, folder / "time.png")
    if rows:
        plot(whole, folder / "pareto.png")
        grid(found["main"], folder / "pictures.png")
    return result


def with_other_settings(results: ResultStore, base: str, settings: Any) -> list[dict[str, Any]]:
    """The main table and its comparisons for all other settings with results."""
    apart: dict[tuple, list[Result]] = {}
    for result in results.all():
        key = result["key"]
        if key["part"] == "main" and key["base"] == base and key["settings"] != settings._asdict():
            apart.setdefault(tuple(key["settings"].values()), []).append(result)
    found = []
    for same in apart.values():
        theirs = same[0]["key"]["settings"]
        changed = {name: value for name, value in theirs.items() if value != getattr(settings, name)}
        rows, verdict = main_rows(of_whole_subjects(same)), judged(same)
        if verdict:
            what = ", ".join(f"{name} {value}" for name, value in changed.items())
            found.append({"settings": theirs, "what": what, "rows": rows, "verdict": verdict})
    return found


def shown_otherwise(other: dict[str, Any]) -> str:
    columns = [name for name in COLUMNS if any(name in row for row in other["rows"])]
    return f"{table(other['rows'], columns)}\n\n{table(other['verdict'], VERDICT_COLUMNS)}"


def of_whole_subjects(results: Sequence[Result]) -> list[Result]:
    """Without subjects that only a few methods have trained on, so that means are over the same subjects."""
    learned: dict[str, set[str]] = {}
    for result in results:
        learned.setdefault(result["key"]["subject"], set()).add(result["key"]["method"])
    most = max(map(len, learned.values()), default=0)
    return [result for result in results if len(learned[result["key"]["subject"]]) > most / 2]


def main_rows(results: Sequence[Result]) -> list[Row]:
    methods = by_method(results)
    device = timed_on(results)
    rows: list[Row] = []
    for name, subjects in methods.items():
        row: Row = {"method": name, **scores_of(subjects)}
        row["copying"] = f"{mean(subjects, 'copying'):+.3f}"
        learned = [result for result in subjects.values() if "parameters" in result]
        if learned:
            row["parameters"] = learned[0]["parameters"]
            row["file MB"] = learned[0]["file_bytes"] / 1e6
        clocked = [result for result in learned if device_of(result) == device]
        if clocked:
            row["training s"] = median([result["training_seconds"] for result in clocked])
            row["memory MB"] = round(median([result["added_bytes"] for result in clocked]) / 1e6)
            row["s / image"] = median([result["seconds_per_image"] for result in clocked])
        kept = {subject: result["base_fidelity"] for subject, result in subjects.items() if "base_fidelity" in result}
        before = {s: c["base_fidelity"] for s, c in methods.get("base", {}).items() if "base_fidelity" in c}
        if kept and before:
            row["forgetting"] = with_interval(paired(before, kept))
        losses = relative_losses(subjects, methods.get("base", {}))
        if losses:
            row["loss"] = with_interval(bootstrap(losses))
        rows.append(row)
    return rows


def device_of(result: Result) -> str:
    return result.get("device", "cpu")  # not part of the first results


def timed_on(results: Sequence[Result]) -> str:
    """The device of most results. Only these are used for costs."""
    devices = [device_of(result) for result in results]
    return max(devices, key=devices.count, default="cpu")


def relative_losses(subjects: dict[str, Result], base: dict[str, Result]) -> list[float]:
    """The loss on unseen real scenes, relative to the base model's: the mean over noise levels, for each subject."""
    found = []
    for subject in sorted(subjects.keys() & base.keys()):  # the bootstrap depends on the order
        ours, theirs = (results[subject].get("unseen_loss") for results in (subjects, base))
        if ours and theirs:
            found.append(sum(a / b for a, b in zip(ours, theirs, strict=True)) / len(ours))
    return found


def scores_of(subjects: dict[str, Result]) -> Row:
    row: Row = {"subjects": len(subjects)}
    for column, field in (("similarity",) * 2, ("top-1", "top_1"), ("fidelity",) * 2, ("harmonic",) * 2):
        row[column] = with_interval(bootstrap([result["scores"][field] for result in subjects.values()]))
    return row


def judged(results: Sequence[Result]) -> list[Row]:
    """Our method in both modes against every other method, subject by subject."""
    methods = by_method(results)
    rows = []
    for ours, (name, subjects) in itertools.product(OURS, methods.items()):
        common = subjects.keys() & methods.get(ours, {}).keys()
        if name in (ours, *REAL) or not common:
            continue
        difference = paired(harmonics(methods[ours]), harmonics(subjects))
        row: Row = {"of": ours, "against": name, "subjects": len(common), "difference": with_interval(difference)}
        if name.startswith(FULL):
            row["asked for"] = f"lower bound above {MARGIN}"
            row["reached"] = reached(difference[1] > MARGIN, len(common))
        elif name in BEATEN:
            row["asked for"] = "above 0"
            row["reached"] = reached(difference[1] > 0, len(common))
        rows.append(row)
    return rows


def reached(is_so: bool, subjects: int) -> str:
    answer = "yes" if is_so else "no"
    return answer if subjects >= ENOUGH else f"{answer}, on {subjects} of {ENOUGH} subjects"


def ablation_rows(results: Sequence[Result]) -> list[Row]:
    methods = by_method(results)
    rows = []
    for name, subjects in methods.items():
        row: Row = {"changed": name, **scores_of(subjects), "copying": f"{mean(subjects, 'copying'):+.3f}"}
        if name != "as it is" and subjects.keys() & methods.get("as it is", {}).keys():
            row["difference"] = with_interval(paired(harmonics(subjects), harmonics(methods["as it is"])))
        rows.append(row)
    return rows


def rate_rows(results: Sequence[Result]) -> list[Row]:
    found: dict[tuple, list[float]] = {}
    for result in results:
        found.setdefault((result["key"]["method"], *result["key"]["rates"]), []).append(result["scores"]["harmonic"])
    return [
        {"method": key[0], "rates": f"{key[1]:g}, word {key[2]:g}", "subjects": len(v), "harmonic": sum(v) / len(v)}
        for key, v in sorted(found.items())
    ]


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def with_interval(values: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)
