"""The panel in the training node while the node trains: a page queues real trainings, follows and steers them."""

import uuid

import pytest

from tests.host.browser import RENDERERS, add_nodes, open_page, ready, set_widget
from tests.host.made_up_runs import PANEL

OLDEST_AND_NEWEST = [("server", RENDERERS[0]), ("newest_server", RENDERERS[1])]
CONNECT = """([loader, picture, train]) => {
    const [a, b, c] = [loader, picture, train].map(id => app.graph.getNodeById(id));
    for (const [from, output, name] of [[a, 0, 'model'], [a, 1, 'clip'], [a, 2, 'vae'], [b, 0, 'images']])
        from.connect(output, c, c.inputs.findIndex(input => input.name === name));
}"""
PICTURE_IS_THERE = "panel => document.querySelector(panel + ' .large img')?.naturalWidth > 0"


@pytest.fixture(scope="module", params=OLDEST_AND_NEWEST, ids="-".join)
def page(request, chromium):
    server, renderer = request.param
    page = open_page(chromium, request.getfixturevalue(server).client, renderer)
    yield page
    page.context.close()


def wait_for(page, pattern: str) -> None:
    page.wait_for_function(
        "([panel, text]) => new RegExp(text).test(document.querySelector(panel)?.innerText ?? '')",
        arg=[PANEL, pattern],
        timeout=120_000,
    )


def press(page, name: str) -> None:
    """With the keyboard, whether the button is in the part of the graph that is shown or not."""
    page.get_by_role("button", name=name).focus()
    page.keyboard.press("Enter")


def queue(page) -> None:
    page.evaluate("async () => { await app.queuePrompt(0); }")


def queue_training(page, run: str, **settings) -> None:
    loader, picture, train = add_nodes(page, "CheckpointLoaderSimple", "EmptyImage", "TrainSAInjectAdapter")
    set_widget(page, loader, "ckpt_name", "sd15.ckpt")
    # A picture of its own, or the training goes on from that of an earlier test.
    for name, value in {"width": 64, "height": 64, "color": int(run[-6:], 16)}.items():
        set_widget(page, picture, name, value)
    for name, value in {"file_name": run, "resolution": 64, "rank": 2, "previews": 0, **settings}.items():
        set_widget(page, train, name, value)
    page.evaluate(CONNECT, [loader, picture, train])
    page.wait_for_selector(PANEL)
    queue(page)


def reopen(page) -> None:
    """The page anew, with the workflow that it had."""
    workflow = page.evaluate("() => app.graph.serialize()")
    page.reload()
    ready(page)
    page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    page.wait_for_selector(PANEL)


def known(page, run: str) -> dict:
    return page.evaluate("async run => await (await fetch('/sa_inject/runs/' + run)).json()", run)


def test_panel_follows_a_training_to_an_early_end_and_shows_it_again(page):
    run = f"live-{uuid.uuid4().hex[:8]}"
    queue_training(page, run, steps=1000, sample_every=1000)
    wait_for(page, r"Step [1-9]\d* of 1000")
    page.wait_for_function(PICTURE_IS_THERE, arg=PANEL)
    reopen(page)
    wait_for(page, r"Step \d+ of 1000")
    press(page, "Sample now")
    page.wait_for_selector(f"{PANEL} .shot >> nth=1", timeout=120_000)
    press(page, "Finish now")
    wait_for(page, "Finished")
    found = known(page, run)
    assert found["phase"] == "done" and 1 <= found["step"] < 1000
    assert [step for step, loss, *_ in found["points"] if loss is not None] == list(range(1, found["step"] + 1))
    first, wished, *_, last = [sample["step"] for sample in found["samples"]]
    assert first == 0 < wished < 1000 and last == found["step"]

    reopen(page)
    wait_for(page, "Finished")
    # Whoever opens the workflow where nothing is known of the run has the node's own result, from the host's cache.
    page.route(f"**/sa_inject/runs/{run}", lambda route: route.fulfill(json=None))
    reopen(page)
    wait_for(page, "Samples and loss appear here")
    queue(page)
    wait_for(page, "Finished")
    assert f"Step {found['step']} of 1000" in page.locator(PANEL).inner_text()
    assert page.locator(f"{PANEL} .shot").count() == len(found["samples"])
    page.wait_for_function(PICTURE_IS_THERE, arg=PANEL)
    page.unroute(f"**/sa_inject/runs/{run}")
    assert page.complaints == []


def test_a_training_that_goes_on_says_from_where_and_ends_by_the_keyboard(page):
    run = f"live-{uuid.uuid4().hex[:8]}"
    queue_training(page, run, steps=200, sample_every=0)
    wait_for(page, r"Step ([3-9]|\d\d+) of 200")
    page.get_by_role("button", name="Finish now").focus()
    page.evaluate("async () => await app.api.interrupt()")
    wait_for(page, "Stopped|Failed")
    queue(page)
    wait_for(page, r"[Gg]oes on from step \d+")
    page.wait_for_selector(f'{PANEL} button[aria-disabled="false"]:focus')  # it has kept the focus
    page.keyboard.press("Enter")
    wait_for(page, "Finished")
    found = known(page, run)
    assert found["resumed_at"] and found["step"] < 200
    assert page.complaints == []


def test_panel_goes_on_after_a_change_of_tab(page):
    run = f"live-{uuid.uuid4().hex[:8]}"
    new_workflow = "async () => await app.extensionManager.command.execute('Comfy.NewBlankWorkflow')"
    page.evaluate(new_workflow)
    page.wait_for_timeout(1000)
    tab = page.locator(".workflow-tabs .workflow-label").last.inner_text()
    queue_training(page, run, steps=1000, sample_every=1000)
    wait_for(page, r"Step ([3-9]|\d\d+) of 1000")
    page.evaluate(new_workflow)
    page.wait_for_selector(PANEL, state="detached")
    left_at = known(page, run)["step"]
    page.get_by_text(tab, exact=True).first.click()
    page.wait_for_function(
        "([panel, step]) => Number(document.querySelector(panel)?.innerText.match(/Step (\\d+) of/)?.[1]) > step",
        arg=[PANEL, left_at],
        timeout=120_000,
    )
    page.wait_for_function(PICTURE_IS_THERE, arg=PANEL)
    press(page, "Finish now")
    wait_for(page, "Finished")
    assert page.complaints == []
