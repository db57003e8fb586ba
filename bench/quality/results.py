"""Stored results, one line each, so that a run resumes where the last one ended."""

from __future__ import annotations

import json
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
