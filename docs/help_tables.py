"""The tables of the help pages, `web/docs/<NodeId>.md`, from the nodes' schemas.

The tooltip is the one source of each input's text. `docs/write.py` writes the pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
TABLE = re.compile(r"<!-- (inputs|outputs) -->\n.*?<!-- end -->\n", re.DOTALL)


def with_tables(page: str, schema: Any) -> str:
    """The page with the tables between its markers written anew. `schema` is an `io.Schema` of ComfyUI."""
    tables = {"inputs": inputs_table(schema.inputs), "outputs": outputs_table(schema.outputs)}
    found = TABLE.findall(page)
    if found != list(tables):
        raise ValueError(f"The help page of {schema.node_id} has the tables {found}. It needs: {list(tables)}.")
    return TABLE.sub(lambda match: f"<!-- {match[1]} -->\n\n{tables[match[1]]}\n\n<!-- end -->\n", page)


def inputs_table(inputs: Iterable[Any]) -> str:
    rows = []
    for socket in inputs:
        name = f"`{socket.id}`" + (" (optional)" if socket.optional else "")
        rows.append((name, _default(socket), _cell(socket.tooltip or "")))
    return _table(("input", "default", "what it is"), rows)


def outputs_table(outputs: Iterable[Any]) -> str:
    return _table(("output", "what it is"), [(f"`{one.display_name}`", _cell(one.tooltip or "")) for one in outputs])


def _default(socket: Any) -> str:
    value = getattr(socket, "default", None)
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def page_of(node_id: str) -> Path:
    return PAGES / f"{node_id}.md"
