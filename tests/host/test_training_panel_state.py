"""What the panel knows of a run: nothing is lost, nothing goes back, and the keyboard's focus stays."""

from types import SimpleNamespace

import pytest

from tests.host.browser import open_page
from tests.host.made_up_runs import LARGE_IS_THERE, PANEL, PROMPTS, add_training_node, put, tell, wait_for

FIRST_STEP = """panel => {
    const canvas = document.querySelector(panel + ' canvas'), box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 1, clientY: box.top + 20}));
    return document.querySelector(panel + ' .told').textContent.startsWith('step 1 ');
}"""
FOCUSED = "() => document.activeElement?.getAttribute('aria-label') ?? document.activeElement?.textContent"


@pytest.fixture(
    scope="module", params=[("server", "classic"), ("newest_server", "vue")], ids=lambda pair: "-".join(pair)
)
def opened(request, chromium):
    frontend, renderer = request.param
    server = request.getfixturevalue(frontend)
    page = open_page(chromium, server.client, renderer)
    yield SimpleNamespace(page=page, client=server.client)
    page.context.close()


@pytest.fixture
def node(opened) -> int:
    return add_training_node(opened)


def shows_all(page) -> None:
    page.wait_for_function(LARGE_IS_THERE, arg=PANEL)
    page.wait_for_function(FIRST_STEP, arg=PANEL)


def samples(*steps: int, drawn_at: float = 1.0) -> list[dict]:
    return [{"step": step, "prompts": PROMPTS, "images": [0, 1], "drawn_at": drawn_at} for step in steps]


def test_what_is_heard_while_a_slow_answer_is_under_way_and_the_answer_both_count(opened, node):
    put(opened, step=60, answers_after=1.0)
    for step in range(60, 65):
        tell(opened, node, step)
    wait_for(opened.page, "Step 64 of 100")
    shows_all(opened.page)
    assert "Step 64 of 100" in opened.page.locator(PANEL).inner_text()


def test_a_sample_that_is_heard_of_while_an_answer_is_under_way_is_fetched(opened, node):
    put(opened, step=60, samples=samples(0), answers_after=1.0)
    tell(opened, node, 60)
    opened.page.wait_for_timeout(200)
    put(opened, step=61, samples=samples(0, 61))
    tell(opened, node, 61, sample=61)
    opened.page.wait_for_selector(f"{PANEL} .large a[title^='Step 61']")


def test_an_event_that_comes_late_does_not_undo_what_is_known(opened, node):
    put(opened, step=60)
    tell(opened, node, 60)
    shows_all(opened.page)
    tell(opened, node, 20, phase="validating", updated_at=1.0)
    opened.page.wait_for_timeout(300)
    assert "Step 60 of 100" in opened.page.locator(PANEL).inner_text()
    tell(opened, node, 61)
    wait_for(opened.page, "Step 61 of 100")


def test_another_training_of_the_same_name_has_pictures_of_its_own(opened, node):
    page, shown = opened.page, f"{PANEL} .large img"
    put(opened, step=60, samples=samples(0, 60))
    tell(opened, node, 60)
    page.wait_for_function(LARGE_IS_THERE, arg=PANEL)
    put(opened, step=0, phase="reading", samples=[], points=[])
    tell(opened, node, 0, phase="reading", loss=None, smoothed=None)
    page.wait_for_selector(shown, state="detached")
    put(opened, step=0, phase="sampling", samples=samples(0, drawn_at=2.0), points=[])
    tell(opened, node, 0, phase="sampling", loss=None, smoothed=None, sample=0)
    page.wait_for_function(LARGE_IS_THERE, arg=PANEL)
    assert page.locator(shown).count() == 1 and "drawn=2" in page.locator(shown).get_attribute("src")


def test_a_run_that_goes_on_has_its_curve_and_pictures_again(opened, node):
    put(opened, step=60, phase="stopped")
    tell(opened, node, 60, phase="stopped")
    shows_all(opened.page)
    tell(opened, node, 0, phase="reading", loss=None, smoothed=None)
    wait_for(opened.page, "Step 0 of 100")
    put(opened, step=60, phase="encoding", resumed_at=[60])
    tell(opened, node, 60, phase="encoding", resumed_at=60)
    wait_for(opened.page, "Goes on from step 60")
    shows_all(opened.page)


def test_a_warning_is_shown_when_it_is_given(opened, node):
    put(opened, step=60)
    tell(opened, node, 60)
    wait_for(opened.page, "Step 60 of 100")
    put(opened, step=61, warnings=["The memory did not last for step 61."])
    tell(opened, node, 61, warnings=1)
    wait_for(opened.page, "The memory did not last for step 61.")


def test_what_is_known_before_the_first_step_is_shown(opened, node):
    put(opened, step=0, phase="encoding")
    tell(opened, node, 0, phase="encoding", loss=None, smoothed=None)
    wait_for(opened.page, "Encoding")
    put(opened, step=0, facts=["3 pictures, 6 pairs.", "A step takes about 2.1 GB; 5.0 GB are free."])
    tell(opened, node, 0, loss=None, smoothed=None, facts=2)
    wait_for(opened.page, "3 pictures, 6 pairs. A step takes about 2.1 GB; 5.0 GB are free.")


def test_finish_now_keeps_the_focus_from_a_cancel_to_the_run_that_goes_on(opened, node):
    page = opened.page
    put(opened)
    tell(opened, node, 60)
    page.get_by_role("button", name="Finish now").focus()
    put(opened, phase="stopped")
    tell(opened, node, 60, phase="stopped")
    wait_for(page, "Stopped")
    page.keyboard.press("Enter")  # nothing to finish
    put(opened, phase="encoding", resumed_at=[60])
    tell(opened, node, 0, phase="reading", loss=None, smoothed=None)
    tell(opened, node, 60, phase="encoding", resumed_at=60)
    wait_for(page, "Goes on from step 60")
    assert page.evaluate(FOCUSED) == "Finish now"
    page.keyboard.press("Enter")
    page.wait_for_function(
        "async run => (await (await fetch('/probe/asked')).json()).some(one => one[0] === run)", arg=opened.run
    )
    assert [wish for run, wish in opened.client.get("/probe/asked") if run == opened.run] == ["finish"]


def test_a_sample_keeps_the_focus_when_the_next_one_comes(opened, node):
    page = opened.page
    put(opened, step=60, samples=samples(0, 60))
    tell(opened, node, 60)
    first = page.locator(f"{PANEL} .shot").first
    first.focus()
    label = page.evaluate(FOCUSED)
    put(opened, step=80, samples=samples(0, 60, 80))
    tell(opened, node, 80, sample=80)
    page.wait_for_selector(f"{PANEL} .shot[aria-label^='Step 80']")
    assert page.evaluate(FOCUSED) == label == f"Step 0: {PROMPTS[0]}"
    assert page.locator(f"{PANEL} .large a").count() == 2  # still compared, now with the newest
    page.locator(f"{PANEL} .large a").last.focus()
    put(opened, step=81, samples=samples(0, 60, 80))
    tell(opened, node, 81)
    wait_for(page, "Step 81 of 100")
    assert page.evaluate("panel => document.activeElement?.matches(panel + ' .large a')", PANEL)


def test_the_frontend_has_nothing_to_say_against_our_script(opened, node):
    assert opened.page.complaints == []
