"""`dev.py serve` opens the browser on a workflow in which Run is all that is left to press."""

import json
import shutil
from pathlib import Path

import pytest

from sa_inject import dev  # pyright: ignore[reportMissingImports]
from tests.host.browser import open_page, ready

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = json.loads((ROOT / "demo/packs/sa_inject_demo/web/settings.json").read_text(encoding="utf-8"))
OPENED = "() => app.graph._nodes.some(node => node.type === 'TrainSAInjectAdapter')"


@pytest.fixture(scope="module")
def demo_server(start_server, tmp_path_factory):
    paths = tmp_path_factory.mktemp("paths") / "paths.yaml"
    folders = {"base_path": str(paths.parent), "custom_nodes": str(dev.DEMO_PACKS)}
    paths.write_text(json.dumps({"sa-inject-demo": folders}))
    with start_server("--extra-model-paths-config", str(paths)) as server:
        checkpoints = server.base / "models" / "checkpoints"
        (checkpoints / dev.DEMO_CHECKPOINT.name).touch()  # it is listed; nothing is drawn here
        shutil.copytree(dev.DEMO_SUBJECT, server.base / "input" / "sa-inject-demo")
        yield server


def test_the_page_opens_ready_to_run_and_keeps_what_is_changed(demo_server, chromium):
    page = open_page(chromium, demo_server.client, "classic")
    page.wait_for_function(OPENED)
    page.wait_for_timeout(1000)
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    for node in prompt.values():
        wanted = {**SETTINGS.get(node["class_type"], {}), **SETTINGS.get(node["_meta"]["title"], {})}
        assert {name: node["inputs"][name] for name in wanted} == wanted
    # The host finds nothing to ask for: it takes the graph as it is.
    reply = page.evaluate("async prompt => await app.api.queuePrompt(0, {output: prompt})", prompt)
    assert reply["prompt_id"] and not reply["node_errors"]
    demo_server.client.interrupt()

    page.evaluate("() => { app.graph.clear(); }")
    page.reload()
    ready(page)
    page.wait_for_timeout(2000)
    assert not page.evaluate("() => sessionStorage.getItem('sa-inject-demo-opened') === null")
    assert page.complaints == [] or all("/sa_inject/runs/" in one for one in page.complaints)
    page.context.close()


def test_the_settings_name_nodes_of_the_workflow():
    workflow = json.loads((ROOT / "workflows" / "train_then_apply.json").read_text(encoding="utf-8"))
    nodes = {node["type"] for node in workflow["nodes"]} | {node.get("title") for node in workflow["nodes"]}
    assert set(SETTINGS) <= nodes
