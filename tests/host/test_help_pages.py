"""Help pages describe the nodes that there are: their tables are the schemas' own texts."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def help_tables():
    from sa_inject.docs import help_tables

    return help_tables


def test_every_node_has_a_help_page(pack_nodes):
    assert sorted(pack_nodes) == PAGES


@pytest.mark.parametrize("node_id", PAGES)
def test_tables_of_the_page_hold_the_texts_of_the_schema(help_tables, pack_nodes, node_id):
    page = help_tables.page_of(node_id).read_text(encoding="utf-8")
    assert page == help_tables.with_tables(page, pack_nodes[node_id].GET_SCHEMA()), "run: python dev.py docs"


def test_english_texts_for_translators_are_those_of_the_schemas(pack_nodes):
    from sa_inject.docs import node_definitions

    schemas = {node_id: node.GET_SCHEMA() for node_id, node in pack_nodes.items()}
    written = node_definitions.PAGE.read_text(encoding="utf-8")
    assert written == node_definitions.text_of(schemas), "run: python dev.py docs, then translate what has changed"


@pytest.mark.parametrize("node_id", PAGES)
def test_every_socket_is_explained(pack_nodes, node_id):
    schema = pack_nodes[node_id].GET_SCHEMA()
    for socket in [*schema.inputs, *schema.outputs]:
        assert len(socket.tooltip or "") > 20, f"{node_id}.{socket.id or socket.display_name} has no tooltip"
    assert len(schema.description) > 20


def test_a_changed_tooltip_changes_the_page(help_tables):
    socket = SimpleNamespace(id="strength", optional=True, default=0.7, tooltip="Old | text.")
    schema = SimpleNamespace(node_id="N", inputs=[socket], outputs=[])
    empty = "# N\n<!-- inputs -->\n<!-- end -->\nText.\n<!-- outputs -->\n<!-- end -->\n"
    page = help_tables.with_tables(empty, schema)
    assert "| `strength` (optional) | 0.7 | Old \\| text. |" in page and "Text." in page
    assert help_tables.with_tables(page, schema) == page
    socket.tooltip = "New text."
    changed = help_tables.with_tables(page, schema)
    assert "New text." in changed and "Old" not in changed
    with pytest.raises(ValueError, match="has the tables"):
        help_tables.with_tables(re.sub("<!-- outputs -->", "", page), schema)
