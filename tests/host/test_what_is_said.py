"""What ours says of a run in which it did nothing, or in which the area mask cannot be meant so."""

import logging

import pytest
import torch

from tests.host.adapters import apply, conditioning, sample


@pytest.fixture
def warned(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("SA-Inject: ")]


@pytest.fixture
def shown(monkeypatch):
    """What the frontend is sent for a node: (text, id of the node)."""
    from server import PromptServer

    texts: list[tuple[str, str]] = []
    monkeypatch.setattr(
        PromptServer.instance,
        "send_progress_text",
        lambda text, node_id, *args, **kwargs: texts.append((text, node_id)),
    )
    return texts


@pytest.mark.parametrize("steps, start, is_said", [(1, 0.3, True), (1, 0.0, False), (4, 0.3, False), (4, 0.9, True)])
def test_a_run_without_a_step_in_between_says_so(comfy_host, model, warned, shown, steps, start, is_said):
    """In the log, and below the Apply node."""
    sample(comfy_host, apply(comfy_host, model, start_percent=start), steps=steps, scheduler="sgm_uniform")
    assert len(warned()) == len(shown) == int(is_said)
    if is_said:
        (line,), ((text, node_id),) = warned(), shown
        assert line == (
            f"SA-Inject: none of the {steps} steps of this run lay between start_percent {start:g} and end_percent 1, "
            f"so the image prompt was not used. Take more steps, or lower start_percent: 0 acts from the first step on."
        )
        assert text == "N" + line.removeprefix("SA-Inject: n") and node_id == "1"


def test_each_of_two_nodes_speaks_for_itself(comfy_host, model, warned):
    patched = apply(comfy_host, apply(comfy_host, model, start_percent=0.95), start_percent=0.0)
    sample(comfy_host, patched, steps=2)
    (line,) = warned()
    assert "start_percent 0.95" in line


def test_a_run_that_was_stopped_early_says_what_holds_for_it(comfy_host, model, warned):
    """A second sampler that only draws the late steps, and a first one that leaves them to it."""
    patched = apply(comfy_host, model, end_percent=0.4)
    first = {"noise_seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    texts = {"positive": conditioning(model, 11), "negative": conditioning(model, 22)}
    for name, steps, is_said in (("first", (0, 2), False), ("last", (2, 4), True)):
        start, end = steps
        comfy_host.execute(
            "KSamplerAdvanced",
            model=patched,
            latent_image={"samples": torch.zeros(1, 4, 8, 8)},
            start_at_step=start,
            end_at_step=end,
            **first,
            **texts,
        )
        assert len(warned()) == int(is_said), name


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.8, 0.2)])
def test_an_empty_range_is_named_at_the_node(comfy_host, model, warned, shown, start, end):
    assert apply(comfy_host, model, start_percent=start, end_percent=end) is model
    (line,) = warned()
    assert f"start_percent {start:g} is not before end_percent {end:g}" in line
    assert [node_id for _, node_id in shown] == ["1"]


@pytest.mark.parametrize(
    "mask, size, is_said",
    [
        ((64, 64), (8, 8), False),
        ((32, 32), (8, 8), False),
        ((1, 1), (8, 8), False),
        ((511, 504), (63, 63), False),  # cut to whole cells
        ((512, 768), (64, 96), False),
        ((64, 128), (8, 8), True),
        ((512, 768), (8, 8), True),
        ((64, 64), (8, 16), True),
    ],
)
def test_an_area_of_another_shape_than_the_run_is_named(comfy_host, model, warned, shown, mask, size, is_said):
    """As in a tile of a larger picture, or a face that is cut out of it."""
    patched = apply(comfy_host, model, attn_mask=torch.ones(1, *mask))
    sample(comfy_host, patched, size=size, steps=1, cfg=1.0)
    assert len(warned()) == len(shown) == int(is_said)
    if is_said:
        (line,), ((text, _),) = warned(), shown
        assert text == line.removeprefix("SA-Inject: ")
        assert f"attn_mask is {mask[1]}x{mask[0]}, but this run draws a picture of {size[1] * 8}x{size[0] * 8}" in line
