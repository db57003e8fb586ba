"""The panel in the training node, told by a real server of trainings that a test makes up.

Two frontends, both renderers.
"""

from types import SimpleNamespace

import pytest

from tests.host.browser import RENDERERS, add_nodes, open_page, ready, serialized
from tests.host.made_up_runs import LARGE_IS_THERE, PANEL, add_training_node, put, run_of, tell, wait_for

COMBINATIONS = [(frontend, renderer) for frontend in ("server", "newest_server") for renderer in RENDERERS]


def named(pair: tuple[str, str]) -> str:
    return "-".join(pair)


oldest_and_newest = pytest.mark.parametrize(
    "opened", [("server", "classic"), ("newest_server", "vue")], indirect=True, ids=named
)


@pytest.fixture(scope="module", params=COMBINATIONS, ids=named)
def opened(request, chromium):
    frontend, renderer = request.param
    server = request.getfixturevalue(frontend)
    page = open_page(chromium, server.client, renderer)
    yield SimpleNamespace(page=page, server=server, client=server.client, renderer=renderer)
    page.context.close()


@pytest.fixture
def node(opened) -> int:
    return add_training_node(opened)


def inked(page) -> int:
    """How many pixels of the plot are not empty."""
    return page.evaluate(
        """panel => {
            const canvas = document.querySelector(panel + ' canvas');
            const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            let count = 0;
            for (let at = 3; at < data.length; at += 4) if (data[at]) count++;
            return count;
        }""",
        PANEL,
    )


def test_panel_follows_a_run_from_its_events(opened, node):
    page = opened.page
    put(opened, step=0, phase="encoding", samples=[], points=[])
    tell(opened, node, 0, phase="encoding", loss=None, smoothed=None)
    wait_for(page, "Encoding")
    for step in range(1, 41):
        tell(opened, node, step)
    wait_for(page, "Step 40 of 100")
    for fact in ("Elapsed 0:20", "Left 0:30", "2.0 steps/s", "5.1 GB"):
        wait_for(page, fact)
    assert inked(page) > 500
    put(opened, step=41)
    tell(opened, node, 41, sample=40)  # a sample that the panel does not know: it fetches the run
    page.wait_for_function(LARGE_IS_THERE, arg=PANEL)
    assert page.locator(f"{PANEL} .prompt-row").count() == 2
    assert page.locator(f"{PANEL} .shot").count() == 6
    tell(opened, node, 41, phase="saving", loss=None, smoothed=None)
    wait_for(page, "Saving")


def test_events_of_another_node_are_not_ours(opened, node):
    tell(opened, 99_999, 77)
    opened.page.wait_for_timeout(300)
    assert "Step 77" not in opened.page.locator(PANEL).inner_text()


def test_a_run_that_goes_on_says_from_where(opened, node):
    put(opened, step=61, resumed_at=[37])
    tell(opened, node, 61, resumed_at=37)
    wait_for(opened.page, "Goes on from step 37")


def test_panel_goes_on_after_a_reload(opened, node):
    page = opened.page
    put(opened, step=60)
    workflow = page.evaluate("() => app.graph.serialize()")
    page.reload()
    ready(page)
    page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    wait_for(page, "Step 60 of 100")
    page.wait_for_function(LARGE_IS_THERE, arg=PANEL)
    # Without events, as after a reload: the client that queued it is gone.
    put(opened, step=75)
    wait_for(page, "Step 75 of 100")
    tell(opened, node, 76)
    wait_for(page, "Step 76 of 100")


@oldest_and_newest
def test_buttons_ask_the_server(opened, node):
    page = opened.page
    put(opened)
    tell(opened, node, 60)
    page.get_by_role("button", name="Finish now").click()
    page.get_by_role("button", name="Sample now").click()
    page.wait_for_function(
        "async run => { const all = await (await fetch('/probe/asked')).json();"
        " return all.filter(one => one[0] === run).length === 2; }",
        arg=opened.run,
    )
    asked = [wish for run, wish in opened.client.get("/probe/asked") if run == opened.run]
    assert asked == ["finish", "sample"]
    put(opened, step=100, phase="done")
    tell(opened, node, 100, phase="done", text=f"saved {opened.run}.safetensors")
    wait_for(page, "Finished")
    assert page.get_by_role("button", name="Finish now").is_disabled()


def test_a_cached_run_shows_its_summary(opened, node):
    summary = run_of(opened.run, step=100, phase="done")
    output = {"sa_inject_training": [summary]}
    data = {"node": str(node), "display_node": str(node), "output": output, "prompt_id": "cached"}
    opened.client.request("/probe/send", {"type": "executed", "data": data})
    wait_for(opened.page, "Finished")
    wait_for(opened.page, f"saved {opened.run}.safetensors")
    assert inked(opened.page) > 500


def test_panel_is_neither_saved_nor_queued(opened, node):
    values = serialized(opened.page, node)["widgets_values"]
    prompt = opened.page.evaluate("async () => (await app.graphToPrompt()).output")[str(node)]["inputs"]
    assert not [name for name in prompt if "panel" in name]
    assert None not in values and len(values) == len(prompt)


def test_a_workflow_saved_after_a_run_opens_with_its_values(opened, node):
    page = opened.page
    before = serialized(page, node)["widgets_values"]
    opened.client.request("/probe/text", {"text": "saved sainj.safetensors", "node": str(node)})
    page.wait_for_function(
        "node => app.graph.getNodeById(node).widgets.at(-1).name === '$$node-text-preview'", arg=node
    )
    assert serialized(page, node)["widgets_values"] == before
    page.evaluate("async () => await app.loadGraphData(app.graph.serialize())")
    assert serialized(page, node)["widgets_values"] == before


@oldest_and_newest
def test_loss_is_read_with_the_keyboard_and_named_for_screen_readers(opened, node):
    page = opened.page
    put(opened)
    tell(opened, node, 60)
    wait_for(page, "Step 60 of 100")
    page.wait_for_function("panel => document.querySelector(panel + ' canvas').clientWidth > 100", arg=PANEL)
    page.locator(f"{PANEL} canvas").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert "step 59" in page.locator(f"{PANEL} .told").inner_text()
    assert page.locator(f"{PANEL} canvas").get_attribute("aria-label").startswith("Loss by step. step 60")
    assert page.locator(f"{PANEL} progress").get_attribute("aria-label")
    for button in page.locator(f"{PANEL} button").all():
        assert button.get_attribute("aria-label") or button.inner_text().strip()


@oldest_and_newest
def test_what_the_server_tells_stays_text(opened, node):
    hostile = "<img src=x onerror=window.taken=1>"
    put(opened, phase="error", text=hostile, warnings=[hostile], class_word=hostile)
    tell(opened, node, 60, phase="error", text=hostile)
    wait_for(opened.page, "onerror")
    assert opened.page.locator(f"{PANEL} [onerror]").count() == 0
    assert opened.page.evaluate("() => window.taken") is None


@oldest_and_newest
def test_dragging_over_the_strip_compares_with_the_newest(opened, node):
    page = opened.page
    put(opened)
    tell(opened, node, 60)
    page.wait_for_selector(f"{PANEL} .shot img")
    box = page.locator(f"{PANEL} .shot").nth(2).bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    wait_for(page, "Step 40")
    assert page.locator(f"{PANEL} .large img").count() == 2
    page.mouse.move(box["x"] - 200, box["y"])
    page.mouse.up()
    page.wait_for_function("panel => document.querySelectorAll(panel + ' .large img').length === 1", arg=PANEL)


@oldest_and_newest
def test_equal_losses_and_a_single_step_have_a_plot(opened, node):
    points = [[1, 0.1, 0.1, None]]
    put(opened, step=1, points=points, samples=[])
    tell(opened, node, 1, loss=0.1, smoothed=0.1)
    wait_for(opened.page, "Step 1 of 100")
    assert inked(opened.page) > 100


@oldest_and_newest
def test_setting_switches_the_panel_off(opened):
    page = opened.page
    page.evaluate("async () => await app.extensionManager.setting.set('SAInject.ShowTrainingPanel', false)")
    add_nodes(page, "TrainSAInjectAdapter")
    page.wait_for_timeout(300)
    assert page.locator(PANEL).count() == 0
    page.evaluate("async () => await app.extensionManager.setting.set('SAInject.ShowTrainingPanel', true)")
    add_nodes(page, "TrainSAInjectAdapter")
    page.wait_for_selector(PANEL)


def test_the_frontend_has_nothing_to_say_against_our_script(opened, node):
    assert opened.page.complaints == []
