"""The state of each training, during and after it: its losses, samples and kept adapters, in one folder.

The folder is `<name>.training` beside the adapter. Runs of this process are in memory, older ones are read from there.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import folder_paths

from ...core.atomic_write import atomic_write
from .files import EXTENSION, FOLDER, adapter_folder

log = logging.getLogger(__name__)

SUFFIX = ".training"  # of the folder; follows the adapter's name
SUMMARY = "run.json"
LOG = "log.csv"
COLUMNS = (
    "step",
    "loss",
    "smoothed",
    "validation",
    "learning_rate",
    "token_learning_rate",
    "gradient_norm",
    "seconds",
    "memory",
)
SAMPLE = re.compile(r"(\d+)-(\d+)\.png")
KEPT = re.compile(r"(\d+)\.safetensors")
SMOOTHING = 0.95  # of the displayed loss, because a diffusion loss varies much from step to step
MOST_POINTS = 500
ENDED = ("done", "stopped", "error")
_CLOCK_START = time.time() - time.monotonic()

_runs: dict[str, TrainingRun] = {}
_lock = threading.Lock()


class TrainingRun:
    """One training, by the name of its adapter. A failed write to disk is reported, and the training continues."""

    def __init__(self, name: str, steps: int, *, node: str | None, prompt_id: str | None) -> None:
        self.name, self.steps, self.node, self.prompt_id = name, steps, node, prompt_id
        self.folder = adapter_folder().joinpath(*f"{name}{SUFFIX}".split("/"))
        self.placeholder_token = self.class_word = self.fingerprint = ""
        self.phase, self.text, self.step = "", "", 0
        self.resumed_at: list[int] = []
        self.rows: dict[int, dict[str, Any]] = {}  # by step, as in the log
        self.prompts: dict[int, list[str]] = {}  # prompts of the samples, by step
        self.facts: list[str] = []  # known before the first step
        self.warnings: list[str] = []
        self.left: float | None = None
        self.memory: int | None = None
        self.wants_finish = self.wants_sample = False
        self._has_begun = False  # no folder is created before the first step
        self._smoothed: float | None = None
        self._start, self._seconds = time.monotonic(), 0.0
        with _lock:
            _runs[name] = self

    @property
    def seconds(self) -> float:
        return self._seconds if self.phase in ENDED else time.monotonic() - self._start

    @property
    def is_over(self) -> bool:
        return self.phase in ENDED

    def begin(self, fingerprint: str, losses: Sequence[float]) -> None:
        """Start, or resume after the steps of `losses`. Files of another training in the folder are moved aside."""
        self.fingerprint, self.step, self._has_begun = fingerprint, len(losses), True
        with self.disk():
            self._take_folder()
        if losses:
            self.resumed_at = [*(at for at in self.resumed_at if at < len(losses)), len(losses)]
        self.rows = {step: row for step, row in self.rows.items() if step <= len(losses)}
        for step, loss in enumerate(losses, start=1):
            self._smoothed = smoothed(self._smoothed, loss)
            self.rows.setdefault(step, {"step": step}).update(loss=loss, smoothed=self._smoothed)
        self.prompts = {step: texts for step, texts in self.prompts.items() if step <= len(losses)}
        with self.disk(), atomic_write(self.folder / LOG) as temporary:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows[step] for step in sorted(self.rows))

    def add(self, step: int, **values: Any) -> None:
        """Add values of a step to the log. Later values of the same step are written as a second line."""
        row = self.rows.setdefault(step, {"step": step})
        if (loss := values.get("loss")) is not None:
            self._smoothed = values["smoothed"] = smoothed(self._smoothed, loss)
        values["seconds"] = round(self.seconds, 3)
        row.update(values)
        with self.disk(), (self.folder / LOG).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step, **values})

    def sample_path(self, step: int, index: int) -> Path:
        return self.folder / f"{step:06}-{index}.png"

    def kept_path(self, step: int) -> Path:
        return self.folder / f"{step:06}{EXTENSION}"

    def samples(self) -> list[dict[str, Any]]:
        found: dict[int, list[int]] = {}
        for step, index in _numbers(self.folder, SAMPLE):
            found.setdefault(step, []).append(index)
        return [
            {
                "step": step,
                "prompts": self.prompts.get(step, []),
                "images": sorted(found[step]),
                "drawn_at": self._drawn_at(step, min(found[step])),
            }
            for step in sorted(found)
            if step in self.prompts
        ]

    def _drawn_at(self, step: int, index: int) -> float:
        """Another training of the same name has other pictures at the same addresses."""
        try:
            return round(self.sample_path(step, index).stat().st_mtime, 3)
        except OSError:
            return 0.0

    def kept(self) -> list[int]:
        return sorted(step for (step,) in _numbers(self.folder, KEPT))

    def write(self) -> None:
        """Write the summary, for a page that is opened after a restart of ComfyUI."""
        if not self._has_begun:
            return
        with self.disk(), atomic_write(self.folder / SUMMARY) as temporary:
            known = {**self.as_dict(MOST_POINTS), "fingerprint": self.fingerprint}
            known["sample_prompts"] = {str(step): texts for step, texts in self.prompts.items()}
            temporary.write_text(json.dumps(known), encoding="utf-8")

    def end(self, phase: str, text: str) -> None:
        self._seconds = time.monotonic() - self._start
        self.phase, self.text, self.left = phase, text, None
        self.write()

    def as_dict(self, most_points: int = MOST_POINTS) -> dict[str, Any]:
        now = timestamp()  # first: what happens while this is put together is newer
        rows = [row for _, row in sorted(dict(self.rows).items())]
        points = [[row["step"], row.get("loss"), row.get("smoothed"), row.get("validation")] for row in rows]
        return {
            "run": self.name,
            "node": self.node,
            "updated_at": now,
            "phase": self.phase,
            "text": self.text,
            "step": self.step,
            "steps": self.steps,
            "resumed_at": self.resumed_at,
            "seconds": round(self.seconds, 3),
            "left": self.left,
            "memory": self.memory,
            "placeholder_token": self.placeholder_token,
            "class_word": self.class_word,
            "points": thinned(points, most_points),
            "samples": self.samples(),
            "kept": self.kept(),
            "facts": list(self.facts),
            "warnings": list(self.warnings),
        }

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        known = _summary(self.folder)
        if known and known.get("fingerprint") != self.fingerprint:
            aside = self.folder / str(known.get("fingerprint") or "earlier")
            aside.mkdir(exist_ok=True)
            for path in self.folder.iterdir():
                if path.is_file() and (
                    path.name in (LOG, SUMMARY) or SAMPLE.fullmatch(path.name) or KEPT.fullmatch(path.name)
                ):
                    path.replace(aside / path.name)
            return
        self.resumed_at = [int(at) for at in known.get("resumed_at", [])]
        self.prompts = {int(step): list(texts) for step, texts in known.get("sample_prompts", {}).items()}
        for row in _log_rows(self.folder / LOG):
            self.rows.setdefault(row["step"], {}).update(row)

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            message = f"The log of this training could not be written to {self.folder} ({error})."
            if message not in self.warnings:
                self.warnings.append(message)
                log.warning("SA-Inject: %s", message)


def timestamp() -> float:
    """Seconds since 1970, never going back while this process runs: a browser tells by it what is newer."""
    return round(_CLOCK_START + time.monotonic(), 4)


def smoothed(before: float | None, loss: float) -> float:
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def thinned(points: list[list[Any]], most: int) -> list[list[Any]]:
    """At most `most` points: every n-th, the last, and as many with a validation loss as fit."""
    if len(points) <= most:
        return points
    every = math.ceil(len(points) / (most * 0.75))
    chosen = {*range(0, len(points), every), len(points) - 1}
    measured = [at for at, point in enumerate(points) if point[3] is not None and at not in chosen]
    chosen.update(measured[: most - len(chosen)])
    return [points[at] for at in sorted(chosen)]


def known_run(name: str) -> dict[str, Any] | None:
    """The state of the training of that name. The name is looked up in lists and never used as a path."""
    with _lock:
        run = _runs.get(name)
    if run is not None:
        return run.as_dict()
    folder = run_folder(name)
    found = {} if folder is None else _summary(folder)
    if not found:
        return None
    if found["phase"] not in ENDED:  # the process that wrote it has ended
        found.update(phase="stopped", text=f"stopped at step {found['step']}", left=None)
    return {key: value for key, value in found.items() if key not in ("fingerprint", "sample_prompts")}


def running(name: str) -> TrainingRun | None:
    with _lock:
        return _runs.get(name)


def run_folder(name: str) -> Path | None:
    """The folder of a training, searched for in the host's adapter folders."""
    for base in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for path in base.rglob(f"*{SUFFIX}"):
            if path.is_dir() and path.relative_to(base).as_posix() == f"{name}{SUFFIX}":
                return path
    return None


def sample_file(name: str, step: int, index: int) -> Path | None:
    folder = run_folder(name)
    path = None if folder is None else folder / f"{step:06}-{index}.png"
    return path if path is not None and path.is_file() else None


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"phase", "step", "points"} <= found.keys() else {}


def _log_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                with contextlib.suppress(ValueError, TypeError):  # a line that was not completely written
                    numbers = {key: float(row[key]) for key in COLUMNS[1:] if row.get(key)}
                    yield {"step": int(row["step"]), **numbers}
    except OSError:
        return


def _numbers(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[int, ...]]:
    try:
        found = [name.fullmatch(path.name) for path in folder.iterdir()]
    except OSError:
        return
    yield from (tuple(map(int, match.groups())) for match in found if match)
