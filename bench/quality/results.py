"""Stored results, one line each, so that a run resumes where the last one ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class ResultStore:
    """A file of JSON lines. The key of a result is everything that it depends on, including the base model."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Result] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a killed run may have left an incomplete line
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                result = json.loads(line)
                self._known[_address(result["key"])] = result

    def find(self, key: Result) -> Result | None:
        return self._known.get(_address(key))

    def all(self) -> list[Result]:
        """In the order in which they were measured."""
        return list(self._known.values())

    def add(self, key: Result, value: Result) -> Result:
        """Written at once, so that it is kept if the run is stopped."""
        result = {"key": key, **value}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")
        self._known[_address(key)] = result
        return result


def _address(key: Result) -> str:
    return json.dumps(key, sort_keys=True)


def best_rates(results: Sequence[Result], method: str) -> tuple[float, float] | None:
    """The pair of a sweep's results with the highest harmonic mean over the subjects; None if there are none.

    A pair counts only if no other pair was tried on more subjects.
    """
    found: dict[tuple[float, float], list[float]] = {}
    for result in results:
        if result["key"]["method"] == method:
            lora_rate, token_rate = result["key"]["rates"]
            found.setdefault((lora_rate, token_rate), []).append(result["scores"]["harmonic"])
    if not found:
        return None
    most = max(map(len, found.values()))
    complete = {pair: sum(values) / most for pair, values in found.items() if len(values) == most}
    return max(complete, key=complete.__getitem__)


def by_method(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """{method: {subject: result}}, in the order of measuring."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result["key"]["method"], {})[result["key"]["subject"]] = result
    return found


def harmonics(subjects: dict[str, Result]) -> dict[str, float]:
    return {subject: result["scores"]["harmonic"] for subject, result in subjects.items()}


def mean(subjects: dict[str, Result], field: str) -> float:
    return sum(result["scores"][field] for result in subjects.values()) / len(subjects)
