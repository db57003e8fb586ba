"""Write the tables of the help pages, `web/docs/<NodeId>.md`, from the nodes' schemas.

    python dev.py docs            write them
    python dev.py docs --check    only say which pages differ

The tooltip is the one source of each input's text. `tests/host/test_help_pages.py` compares pages and schemas.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
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


def main(arguments: list[str]) -> int:
    differ = []
    with tempfile.TemporaryDirectory() as folder:
        nodes = _start_host(Path(folder)).pack_nodes()
        for node_id, node in nodes.items():
            page = page_of(node_id)
            old = page.read_text(encoding="utf-8")
            new = with_tables(old, node.GET_SCHEMA())
            if new != old:
                differ.append(page.relative_to(ROOT).as_posix())
                if "--check" not in arguments:
                    page.write_text(new, encoding="utf-8", newline="\n")
    print("\n".join(differ) or "The help pages have the texts of the schemas.")
    return 1 if differ and "--check" in arguments else 0


def _start_host(base: Path) -> Any:
    """ComfyUI in this process. The root stays off the path: its folder `nodes` would hide ComfyUI's module."""
    path = ROOT / "tests" / "host" / "full_size.py"
    spec = importlib.util.spec_from_file_location("tests.host.full_size", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.start_host(base, base)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
