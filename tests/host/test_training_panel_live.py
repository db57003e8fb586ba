"""The panel in the training node while the node trains: one page queues a real training and follows it."""

import uuid

import pytest

from tests.host.browser import RENDERERS, add_nodes, open_page, ready, set_widget

PANEL = ".sa-inject-panel"
OLDEST_AND_NEWEST = [("server", RENDERERS[0]), ("newest_server", RENDERERS[1])]
CONNECT = """([loader, picture, train]) => {
    const [a, b, c] = [loader, picture, train].map(id => app.graph.getNodeById(id));
    for (const [from, output, name] of [[a, 0, 'model'], [a, 1, 'clip'], [a, 2, 'vae'], [b, 0, 'images']])
        from.connect(output, c, c.inputs.findIndex(input => input.name === name));
}"""


@pytest.fixture(params=OLDEST_AND_NEWEST, ids="-".join)
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


def finish(page) -> None:
    """Whether the button is in the part of the graph that is shown or not."""
    button = page.get_by_role("button", name="Finish now")
    page.wait_for_function("button => !button.disabled", arg=button.element_handle(), timeout=60_000)
    button.dispatch_event("click")
    wait_for(page, "Finished")


def queue_training(page, **settings) -> int:
    loader, picture, train = add_nodes(page, "CheckpointLoaderSimple", "EmptyImage", "TrainSAInjectAdapter")
    set_widget(page, loader, "ckpt_name", "sd15.ckpt")
    for name, value in {"width": 64, "height": 64, "color": 0x884422}.items():
        set_widget(page, picture, name, value)
    for name, value in {"resolution": 64, "rank": 2, "previews": 0, **settings}.items():
        set_widget(page, train, name, value)
    page.evaluate(CONNECT, [loader, picture, train])
    page.wait_for_selector(PANEL)
    page.evaluate("async () => { await app.queuePrompt(0); }")
    return train


def test_panel_follows_a_training_through_a_reload_to_an_early_end(page):
    run = f"live-{uuid.uuid4().hex[:8]}"
    queue_training(page, steps=1000, sample_every=5, file_name=run)
    wait_for(page, r"Step [1-9]\d* of 1000")
    page.wait_for_function("panel => document.querySelector(panel + ' .large img')?.naturalWidth > 0", arg=PANEL)
    workflow = page.evaluate("() => app.graph.serialize()")
    page.reload()
    ready(page)
    page.evaluate("async workflow => await app.loadGraphData(workflow)", workflow)
    wait_for(page, r"Step \d+ of 1000")
    finish(page)
    found = page.evaluate("async run => await (await fetch('/sa_inject/runs/' + run)).json()", run)
    assert found["phase"] == "done" and 1 <= found["step"] < 1000
    assert [step for step, loss, *_ in found["points"] if loss is not None] == list(range(1, found["step"] + 1))
    assert {0, found["step"]} <= {sample["step"] for sample in found["samples"]}


def test_a_training_that_goes_on_says_from_where(page):
    run = f"live-{uuid.uuid4().hex[:8]}"
    queue_training(page, steps=200, file_name=run)
    wait_for(page, r"Step ([3-9]|\d\d+) of 200")
    page.evaluate("async () => await app.api.interrupt()")
    page.wait_for_function(
        "async run => ['stopped', 'error'].includes((await (await fetch('/sa_inject/runs/' + run)).json()).phase)",
        arg=run,
        timeout=60_000,
    )
    page.evaluate("async () => { await app.queuePrompt(0); }")
    wait_for(page, r"[Gg]oes on from step \d+")
    finish(page)
