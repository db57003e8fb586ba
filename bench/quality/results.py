"""Results that took long to get, one line each, so that a run goes on where the last one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Cells:
    """A file of JSON lines. A cell is found again by what it was made from; another base model makes it another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Cell] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left a line unfinished
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                cell = json.loads(line)
                self._known[_address(cell["key"])] = cell

    def find(self, key: Cell) -> Cell | None:
        return self._known.get(_address(key))

    def all(self) -> list[Cell]:
        """In the order in which they were measured."""
        return list(self._known.values())

    def add(self, key: Cell, value: Cell) -> Cell:
        """Written at once: whatever stops the run, this is kept."""
        cell = {"key": key, **value}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell) + "\n")
        self._known[_address(key)] = cell
        return cell


def _address(key: Cell) -> str:
    return json.dumps(key, sort_keys=True)
