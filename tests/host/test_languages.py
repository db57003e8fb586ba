"""Panel and card speak the language of the frontend, with our words. So do nodes and inputs in the newest one.

Frontend 1.32.9 loads its own Chinese and Japanese after the words of packs, and puts them in their place.
"""

import json
from pathlib import Path

import pytest

from tests.host.browser import add_nodes, open_page
from tests.host.made_up_runs import PANEL

ROOT = Path(__file__).resolve().parents[2]
NODE = "TrainSAInjectAdapter"
CARD = ".sa-inject-card"


def words(locale: str, name: str) -> dict:
    return json.loads((ROOT / "locales" / locale / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("locale", ["zh", "ja"])
@pytest.mark.parametrize("frontend, renderer", [("server", "classic"), ("newest_server", "vue")])
def test_the_page_speaks_our_words(request, chromium, frontend, renderer, locale):
    node_words, our_words = words(locale, "nodeDefs")[NODE], words(locale, "main")["saInject"]
    page = open_page(chromium, request.getfixturevalue(frontend).client, renderer, locale)
    try:
        train, load = add_nodes(page, NODE, "LoadSAInjectAdapter")
        page.wait_for_selector(PANEL)
        page.get_by_text(our_words["panel"]["empty"], exact=True).wait_for()
        page.get_by_text(our_words["card"]["choose"], exact=True).first.wait_for()
        shown = page.evaluate(
            """node => {
                const found = app.graph.getNodeById(node);
                const labels = found.widgets.map(widget => [widget.name, widget.label]);
                return {title: found.title, labels: Object.fromEntries(labels)};
            }""",
            train,
        )
        if frontend == "newest_server":
            assert shown["title"] == node_words["display_name"]
            named = {name: words["name"] for name, words in node_words["inputs"].items() if name in shown["labels"]}
            assert named and {name: shown["labels"][name] for name in named} == named
        assert page.complaints == []
    finally:
        page.context.close()
