"""Where the nodes of the shipped workflows lie in the browser, with everything on them that a run shows."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.host.browser import RENDERERS, open_page

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
OLDER = sorted((Path(__file__).parent / "data" / "older_workflows").glob("*.json"))
SPEAKS = {"TrainSAInjectAdapter", "LoadSAInjectDataset", "LoadSAInjectAdapter", "ApplySelfAttnInjection"}
DRAWS = {"SaveImage", "PreviewImage", "LossGraphNode"}
COMBINATIONS = [(frontend, renderer) for frontend in ("server", "newest_server") for renderer in RENDERERS]
RECTANGLES = """() => {
    app.canvas.draw(true, true);
    return app.graph._nodes.map(node => {
        const name = node.title + ' #' + node.id;
        const shown = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
        if (shown) {
            const {left, top, right, bottom} = shown.getBoundingClientRect();
            return [name, left, top, right, bottom];
        }
        const [x, y, wide, tall] = node.getBounding(new Float32Array(4));
        return [name, x, y, x + wide, y + tall];
    });
}"""

# What Run would send of our nodes.
VALUES = """async () => Object.values((await app.graphToPrompt()).output)
    .filter(node => /SAInject|SelfAttnInjection|EncodeImagePrompt/.test(node.class_type)).map(node => node.inputs)"""


@pytest.fixture(scope="module", params=COMBINATIONS, ids=lambda pair: "-".join(pair))
def opened(request, chromium):
    frontend, renderer = request.param
    server = request.getfixturevalue(frontend)
    Image.new("RGB", (128, 128)).save(server.base / "input" / "example.png")
    (server.base / "input" / "sa-inject-demo").mkdir(exist_ok=True)
    # All nodes have to be in sight: Nodes 2.0 need not lay out what is not.
    page = open_page(chromium, server.client, renderer, viewport={"width": 3000, "height": 1600})
    yield SimpleNamespace(page=page, client=server.client)
    page.context.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_node_lies_over_another_while_it_runs(opened, path):
    page, workflow = opened.page, json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    page.evaluate("() => { app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [100, 200]; }")
    for node in workflow["nodes"]:
        number = str(node["id"])
        if node["type"] in SPEAKS:
            told = {"text": "step 123/400, loss 0.1234, 12:34 left", "node": number}
            opened.client.request("/probe/text", told)
        if node["type"] in DRAWS:
            output = {"images": [{"filename": "example.png", "subfolder": "", "type": "input"}]}
            data = {"node": number, "display_node": number, "prompt_id": "told", "output": output}
            opened.client.request("/probe/send", {"type": "executed", "data": data})
    page.wait_for_timeout(1500)
    boxes = page.evaluate(RECTANGLES)
    assert len(boxes) == len(workflow["nodes"])
    if any(node["type"] == "TrainSAInjectAdapter" for node in workflow["nodes"]):
        assert page.locator(".sa-inject-panel").count() == 1
        assert page.evaluate(
            "() => app.graph._nodes.some(node => node.widgets?.some(widget => widget.name === '$$node-text-preview'))"
        )
    for place, (name, left, top, right, bottom) in enumerate(boxes):
        assert right - left > 50 and bottom - top > 20
        for other, left2, top2, right2, bottom2 in boxes[place + 1 :]:
            beside = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert beside, f"'{name}' and '{other}' overlap"
    before = page.evaluate(VALUES)
    page.evaluate("async () => await app.loadGraphData(app.graph.serialize())")
    assert page.evaluate(VALUES) == before


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_a_workflow_saved_before_the_panel_opens_with_its_values(opened, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    opened.page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    shown = opened.page.evaluate("() => app.graph.serialize().nodes")
    values = {node["id"]: node.get("widgets_values", []) for node in shown}
    for node in workflow["nodes"]:
        saved = node.get("widgets_values", [])
        assert values[node["id"]][: len(saved)] == saved
    assert opened.page.complaints == [] or all("/sa_inject/runs/" in one for one in opened.page.complaints)
