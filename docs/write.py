"""Write what files repeat of the source: tables of inputs and outputs, the nodes' English texts, the list of messages.

    python dev.py docs            write them
    python dev.py docs --check    only say which pages differ

`tests/host/test_help_pages.py` and `tests/test_pages.py` compare pages and source.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    full_size = load_full_size()
    pages: dict[Path, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        nodes = full_size.start_host(Path(folder), Path(folder)).pack_nodes()
        tables = importlib.import_module("sa_inject.docs.help_tables")
        for node_id, node in nodes.items():
            page = tables.page_of(node_id)
            pages[page] = tables.with_tables(page.read_text(encoding="utf-8"), node.GET_SCHEMA())
        definitions = importlib.import_module("sa_inject.docs.node_definitions")
        pages[definitions.PAGE] = definitions.text_of({node_id: node.GET_SCHEMA() for node_id, node in nodes.items()})
    messages = importlib.import_module("sa_inject.docs.messages")
    pages[messages.PAGE] = messages.with_table(messages.PAGE.read_text(encoding="utf-8"))
    differ = [page for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    if "--check" not in arguments:
        for page in differ:
            page.write_text(pages[page], encoding="utf-8", newline="\n")
    print("\n".join(page.relative_to(ROOT).as_posix() for page in differ) or "The pages are as the source says.")
    return 1 if differ and "--check" in arguments else 0


def load_full_size() -> ModuleType:
    """Load `tests/host/full_size.py` by its path. The root stays off `sys.path`: `nodes` there is ComfyUI's."""
    path = ROOT / "tests" / "host" / "full_size.py"
    spec = importlib.util.spec_from_file_location("tests.host.full_size", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
