"""The real frontend in a real browser: the templates open, our nodes are there, and their help is served."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()
NODES = (
    "LoadSAInjectDataset",
    "TrainSAInjectAdapter",
    "SAInjectTrainingSettings",
    "SaveSAInjectAdapter",
    "LoadSAInjectAdapter",
    "EncodeImagePrompt",
    "ApplySelfAttnInjection",
    "InspectSelfAttnInjection",
)

needs_browser = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(server):
    from playwright.sync_api import sync_playwright

    server.client.request("/api/settings", {"Comfy.TutorialCompleted": True})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(f"http://{server.client.address}")
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager", timeout=120_000)
        yield page
        browser.close()


@needs_browser
@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflow_opens_in_the_frontend_and_queues_as_it_was_saved(page, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
    nodes = page.evaluate("() => window.app.graph._nodes.map(n => ({type: n.type, widgets: n.widgets_values}))")
    assert sorted(node["type"] for node in nodes) == sorted(node["type"] for node in workflow["nodes"])
    registered = page.evaluate("() => window.app.graph._nodes.map(n => n.constructor.nodeData?.name ?? n.type)")
    assert set(registered) == {node["type"] for node in workflow["nodes"]}

    queued = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    ours = [node for node in workflow["nodes"] if node["type"] in NODES]
    for node in ours:
        inputs = queued[str(node["id"])]["inputs"]
        linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
        assert linked <= set(inputs)


@pytest.mark.parametrize("node", NODES)
def test_help_page_of_the_node_names_every_input(client, node):
    page = client.request(f"/extensions/sa-inject/docs/{node}.md").decode()
    inputs = client.object_info(node)["input"]
    for name in {**inputs["required"], **inputs.get("optional", {})}:
        assert f"`{name}`" in page


@pytest.mark.parametrize("node", NODES)
def test_every_input_explains_itself(client, node):
    inputs = client.object_info(node)["input"]
    for name, spec in {**inputs["required"], **inputs.get("optional", {})}.items():
        assert len(spec[1].get("tooltip", "")) > 20, f"{node}.{name} has no tooltip worth the name"
