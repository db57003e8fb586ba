"""Other nodes change the network: the reference pass is made as the call that draws, or ours says what is in the way.

Each mechanism is that of popular packs, which `probe_nodes/mechanisms.py` names.
"""

import pytest
import torch

from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    base_model,
    conditioning,
    make_adapter,
    make_prompt,
    random,
    relative_error,
    sample,
)
from tests.host.test_rows import assert_only_rows_that_read, count_unet_rows

VISIBLE = 1e-3
MODES = ["clean", "noised"]


@pytest.fixture(scope="module")
def model(own_model):
    """Some nodes change it in place."""
    return own_model


@pytest.fixture(scope="module")
def texts(comfy_host):
    model = base_model(comfy_host, "sd15")
    return {"positive": conditioning(model, 11), "negative": conditioning(model, 22)}


def drawn(host, other, mode: str, prompt=None, **inputs):
    """What both draw together, in either order; both are to be seen in it."""
    model = inputs.pop("model")
    adapter, prompt = make_adapter(model, mode), prompt or make_prompt((8, 8), (8, 16))
    found = [
        sample(host, given, **inputs)
        for given in (apply(host, other(model), adapter, prompt), other(apply(host, model, adapter, prompt)))
    ]
    assert found[0].isfinite().all()
    assert relative_error(*found) < 1e-5
    assert relative_error(found[0], sample(host, other(model), **inputs)) > VISIBLE  # ours
    assert relative_error(found[0], sample(host, apply(host, model, adapter, prompt), **inputs)) > VISIBLE  # theirs
    return found[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("through", ["conds", "extra_conds"])
def test_further_input_channels_are_filled_up(comfy_host, model, texts, log, mode, channels, through):
    """The reference is shown with nothing in them, so what is in them for the drawing does not matter to it."""
    widened, positive, negative = comfy_host.node("ProbeWiderInput")().patch(
        model, **texts, channels=channels, through=through
    )
    adapter = make_adapter(model, mode)
    inputs = {"positive": positive, "negative": negative}
    spy = Spy(keys=(FIRST,))
    found = sample(comfy_host, spy.on(apply(comfy_host, widened, adapter)), **inputs)
    assert {call["x"].shape[1] for call in spy.calls} == {4 + channels}
    assert_only_rows_that_read(spy, positive)
    assert relative_error(found, sample(comfy_host, widened, **inputs)) > VISIBLE
    assert found.isfinite().all() and log() == []


@pytest.mark.parametrize("mode", MODES)
def test_inpainting_models_are_read_with_their_own_channels(comfy_host, mode):
    model = base_model(comfy_host, "sd15_inpaint")
    found = sample(comfy_host, apply(comfy_host, model, make_adapter(model, mode)))
    assert relative_error(found, sample(comfy_host, model)) > VISIBLE


def motion(host, frames: int = 4):
    return lambda model: host.execute("ProbeMotionModules", model=model, frames=frames)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_modules_that_count_rows_get_as_many_as_in_the_call_that_draws(comfy_host, model, texts, log, mode, cfg):
    found = drawn(comfy_host, motion(comfy_host), mode, model=model, batch=4, cfg=cfg, **texts)
    assert found.shape[0] == 4 and log() == []


def test_a_reference_read_among_motion_modules_is_one_picture_throughout(comfy_host, model, texts):
    """Frames that are all the same see only themselves, so pictures do not mix."""
    prompt = make_prompt((8, 8), (8, 8))
    patched = motion(comfy_host)(apply(comfy_host, model, prompt=prompt))
    module = patched.get_attachment("probe")
    calls = count_unet_rows(model, lambda: sample(comfy_host, patched, batch=4, steps=1, **texts))
    assert calls.rows == [8, 8, 8]  # a picture, a picture, the drawing
    assert set(module.rows) == {8}
    swapped = apply(comfy_host, model, prompt=type(prompt)(prompt.pictures[::-1]))
    other = sample(comfy_host, motion(comfy_host)(swapped), batch=4, steps=1, **texts)
    assert relative_error(calls.drawn, other) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_what_a_layer_keeps_for_the_drawing_is_not_taken_by_the_reference(comfy_host, model, texts, log, mode):
    def adds(given):
        return comfy_host.execute("ProbeAddsToLayers", model=given)[0]

    drawn(comfy_host, adds, mode, model=model, **texts)
    assert log() == []
    for block in model.model.diffusion_model.input_blocks:
        assert not any("forward" in vars(layer) for layer in block)


@pytest.mark.parametrize("mode", MODES)
def test_attention_of_another_pack_keeps_its_place(comfy_host, model, texts, log, mode):
    """It has no projections for ours to use. In the first layer alone, ours acts in the rest."""

    def shared(layers):
        return lambda given: comfy_host.execute("ProbeSharedAttention", model=given, layers=layers)[0]

    drawn(comfy_host, shared(1), mode, model=model, **texts)
    assert set(log()) == {"SA-Inject skipped injection in input 1.0: another node replaces the self-attention there."}
    everywhere = shared(99)(apply(comfy_host, model, make_adapter(model, mode)))
    found = count_unet_rows(model, lambda: sample(comfy_host, everywhere, **texts))
    assert found.rows == [2, 2]  # nothing to read for
    assert torch.equal(found.drawn, sample(comfy_host, shared(99)(model), **texts))


@pytest.mark.parametrize("mode", MODES)
def test_features_added_to_the_first_block_stay_with_the_drawing(comfy_host, model, texts, log, mode):
    """They have the size of the drawing, and a reference may have another."""
    drawn(comfy_host, lambda given: comfy_host.execute("ProbeInputBlock", model=given)[0], mode, model=model, **texts)
    assert log() == []


def test_calls_that_go_to_another_network_are_left_alone(comfy_host, model, texts, log):
    """A refiner in the place of the model: its layers and its texts are others."""
    other = comfy_host.load_checkpoint("sd2")[0]
    context = random(1, 7, 1024)
    node = comfy_host.node("ProbeOtherNetwork")()

    def refined(given):
        return node.patch(given, other, context)[0]

    found = sample(comfy_host, refined(apply(comfy_host, model)), **texts)
    assert torch.equal(found, sample(comfy_host, refined(model), **texts))
    (line,) = log()
    assert line.endswith("they go to another network than the one that the adapter was made for.")


def test_another_model_of_the_same_kind_gets_a_reference_of_its_own(comfy_host, model, texts):
    from sa_inject.nodes.host.drawing.patch import RUN_KEY  # pyright: ignore[reportMissingImports]

    other = comfy_host.load_checkpoint("sd15")[0]
    with torch.inference_mode():
        for block in other.model.diffusion_model.input_blocks:
            for parameter in block.parameters():
                parameter.mul_(0.9)
    node = comfy_host.node("ProbeOtherNetwork")()
    spy = Spy(keys=())
    sample(comfy_host, spy.on(node.patch(apply(comfy_host, model), other)[0]), **texts)
    run = spy.calls[0]["options"][RUN_KEY]
    assert {key.source[1] for key in run.banks} == {id(other.model.diffusion_model)}


def test_what_fails_inside_of_a_changed_network_ends_in_a_sentence(comfy_host, model, texts):
    """A module that holds something for every pixel of the drawing cannot read a reference of another size."""
    from sa_inject.nodes.host.drawing.reference_call import ReferencePassError  # pyright: ignore[reportMissingImports]

    class Pixels(torch.nn.Module):
        def forward(self, x):
            return x + torch.ones(1, 1, 4, 4)

    def masked(given):
        given = given.clone()
        given.add_object_patch("diffusion_model.middle_block.2", Pixels())
        return given

    assert sample(comfy_host, masked(model), **texts).isfinite().all()
    plain = sample(comfy_host, model, **texts)
    with pytest.raises(
        ReferencePassError, match="could not read the image prompt.*other nodes inside: Pixels.* or the Apply"
    ):
        sample(comfy_host, masked(apply(comfy_host, model, prompt=make_prompt((8, 12)))), **texts)
    assert torch.equal(sample(comfy_host, model, **texts), plain)


def test_further_arguments_of_the_call_reach_the_reference_pass(comfy_host, model, texts):
    """Those with a value for each row get as many as the reference has."""
    given = []
    unet = type(model.model.diffusion_model)
    forward = unet._forward

    def watched(self, x, *args, **kwargs):
        given.append((len(x), kwargs["of_rows"].shape[0], kwargs["of_all"]))
        return forward(self, x, *args)

    def extended(apply_model, call):
        x = call["input"]
        return apply_model(x, call["timestep"], **call["c"], of_rows=random(len(x), 3), of_all="word")

    model = model.clone()
    model.set_model_unet_function_wrapper(extended)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "_forward", watched)
        for mode in MODES:
            sample(comfy_host, apply(comfy_host, model, make_adapter(model, mode), make_prompt(*[(8, 8)] * 2)), **texts)
    assert {(rows, word) for rows, of_rows, word in given if rows == of_rows} == {(2, "word")}
    assert all(rows == of_rows for rows, of_rows, _ in given)


@pytest.mark.parametrize("mode", MODES)
def test_quantised_layers_do_not_count_as_changes(comfy_host, model, texts, mode):
    """GGUF and other packs put linear layers of their own class into the network."""

    class Quantised(torch.nn.Linear):
        pass

    linear = model.model.diffusion_model.middle_block[1].transformer_blocks[0].ff.net[2]
    own = Quantised(linear.in_features, linear.out_features)
    own.weight, own.bias = linear.weight, linear.bias
    expected = count_unet_rows(
        model, lambda: sample(comfy_host, apply(comfy_host, model, make_adapter(model, mode)), **texts)
    )
    patched = apply(comfy_host, model, make_adapter(model, mode))
    patched.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2", own)
    found = count_unet_rows(model, lambda: sample(comfy_host, patched, **texts))
    assert found.rows == expected.rows
    assert relative_error(found.drawn, expected.drawn) < 1e-5
