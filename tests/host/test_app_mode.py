"""The shipped workflows in the frontend's App mode, which shows chosen inputs and results without the graph."""

import json
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.host.browser import open_page, set_widget

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SWITCH = "async () => await app.extensionManager.command.execute('Comfy.ToggleLinear')"
WIDGETS, RUN = "[data-testid=linear-widgets]", "[data-testid=linear-run-button]"
SAMPLE = "[data-testid=linear-center-panel] img[src^=blob]"  # the node's live preview
SHOWS = """name => [...document.querySelectorAll('img')].some(
    img => img.naturalWidth > 0 && new URL(img.src).searchParams.get('filename')?.startsWith(name)
)"""


@pytest.fixture(scope="module")
def opened(newest_server, chromium):
    Image.new("RGB", (128, 128)).save(newest_server.base / "input" / "example.png")
    subject = newest_server.base / "input" / "sa-inject-demo"
    subject.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "orange").save(subject / "subject.png")
    page = open_page(chromium, newest_server.client, "vue", viewport={"width": 1400, "height": 1300})
    yield SimpleNamespace(page=page)
    page.context.close()


def open_workflow(page, path: Path) -> dict:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate("([workflow, name]) => app.loadGraphData(workflow, true, true, name)", [workflow, path.stem])
    return workflow


def enter_app_mode(page) -> None:
    page.evaluate(SWITCH)
    page.wait_for_selector(WIDGETS)
    page.wait_for_timeout(1000)  # the first time, a tour opens
    skip = page.get_by_text("Skip", exact=True)
    if skip.count():
        skip.first.click()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_chosen_input_is_shown_under_a_name_of_its_own(opened, path):
    page = opened.page
    workflow = open_workflow(page, path)
    enter_app_mode(page)
    shown = page.locator(WIDGETS).inner_text().splitlines()
    page.evaluate(SWITCH)
    slots = {(node["id"], slot["name"]): slot for node in workflow["nodes"] for slot in node["inputs"]}
    chosen = [slots[node, name] for node, name in workflow["extra"]["linearData"]["inputs"]]
    names = [slot.get("label", slot["name"]) for slot in chosen]
    assert [line for line in shown if line in names] == names
    assert len(set(names)) == len(names)


def test_run_trains_and_shows_the_result(opened):
    page = opened.page
    workflow = open_workflow(page, ROOT / "workflows" / "train_then_apply.json")
    node = {node["type"]: node["id"] for node in workflow["nodes"]}
    set_widget(page, node["CheckpointLoaderSimple"], "ckpt_name", "sd15.ckpt")
    small = {"resolution": 64, "steps": 2, "rank": 2, "file_name": f"app-{uuid.uuid4().hex[:8]}"}
    for name, value in small.items():
        set_widget(page, node["TrainSAInjectAdapter"], name, value)
    for name in ("width", "height"):
        set_widget(page, node["EmptyLatentImage"], name, 64)
    enter_app_mode(page)
    page.locator(RUN).get_by_role("button", name="Run", exact=True).click()
    page.wait_for_selector(SAMPLE, timeout=120_000)
    for name in ("base_", "adapter_"):
        page.wait_for_function(SHOWS, arg=name, timeout=120_000)
    page.evaluate(SWITCH)
    assert page.complaints == []
