"""Other packs on the same model: nobody crashes, both effects stay, and where injection is skipped a log line says so.

Every node is tried upstream and downstream of ours; the picture is the same.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_inject.core.kv import KV  # pyright: ignore[reportMissingImports]
from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    conditioning,
    make_adapter,
    make_prompt,
    naive_attention,
    random,
    relative_error,
    sample,
)

Node = Callable[[Any], Any]
VISIBLE = 1e-3
REPLACED = "another node replaces the self-attention there"
# Of the calls of the kernel: four layers in the reference pass, then the picture's own keys, then the reference's.
FIRST_BANK = 5


@pytest.fixture(scope="module")
def ours(comfy_host, model) -> Node:
    """Our Apply node, always the same."""
    adapter, prompt = make_adapter(model), make_prompt()
    return lambda given: apply(comfy_host, given, adapter, prompt)


@pytest.fixture(scope="module")
def injected(comfy_host, model, ours) -> Tensor:
    """Our effect alone."""
    return sample(comfy_host, ours(model))


@pytest.fixture
def log(caplog) -> Callable[[], list[str]]:
    """The lines that say where injection was skipped."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if "SA-Inject skipped injection" in r.getMessage()]


@pytest.fixture(scope="module")
def both_stay(comfy_host, model, ours, injected) -> Callable[[Node], Tensor]:
    """Together, in either order, ours and the other node draw one picture, and neither one's own."""
    plain = sample(comfy_host, model)

    def draw_both(other: Node) -> Tensor:
        alone = sample(comfy_host, other(model))
        after, before = sample(comfy_host, other(ours(model))), sample(comfy_host, ours(other(model)))
        assert after.isfinite().all()
        assert torch.equal(after, before)
        assert relative_error(after, alone) > VISIBLE  # ours is there
        assert relative_error(after, injected) > VISIBLE  # and so is theirs
        assert relative_error(alone, plain) > VISIBLE
        return after

    return draw_both


@pytest.mark.parametrize("node_id", ["PerturbedAttentionGuidance", "SelfAttentionGuidance"])
def test_guidance_that_replaces_the_middle_keeps_it(comfy_host, model, log, node_id, both_stay):
    both_stay(lambda given: comfy_host.execute(node_id, model=given, scale=2.0)[0])
    assert set(log()) == {f"SA-Inject skipped injection in middle 0.0: {REPLACED}."}


def test_perturbed_attention_pass_is_injected_elsewhere(comfy_host, model, ours):
    """The weakened picture is that of the subject too, or guidance would push towards the subject itself."""
    spy = Spy()
    (patched,) = comfy_host.execute("PerturbedAttentionGuidance", model=spy.on(ours(model)))
    sample(comfy_host, patched, steps=1)
    assert [len(call["x"]) for call in spy.calls] == [2, 1]
    perturbed = [a for a in spy.attended if len(a.q) == 1]
    for a in perturbed:
        if a.key.stage == "middle":
            assert torch.equal(a.out, a.v)
        else:
            assert a.injected_rows() == [0]
    assert len(perturbed) == 5


def test_hypertile_gets_the_reference_in_every_tile(comfy_host, model, ours, log, both_stay):
    """It folds tiles of q into the batch and leaves k and v whole; the host's kernels reshape them so."""

    def hypertile(given):
        return comfy_host.execute("HyperTile", model=given, tile_size=1, swap_size=2)[0]

    both_stay(hypertile)
    spy = Spy(keys=(FIRST,))
    bank = bank_of_first(comfy_host, model, ours)
    sample(comfy_host, spy.on(ours(hypertile(model))), steps=1, cfg=1.0)
    (a,) = spy.attended
    assert (a.q.shape[0], a.k.shape[0]) == (4, 1)
    own = KV(a.k.reshape(4, -1, a.k.shape[-1]), a.v.reshape(4, -1, a.v.shape[-1]))
    assert relative_error(a.out, naive_attention(a.q, own, [(bank, 1.0)], a.heads)) < 1e-5
    assert log() == []


def test_hypertile_maps_rows_of_a_batch(comfy_host, model, ours):
    spy = Spy(keys=(FIRST,))
    (tiled,) = comfy_host.execute("HyperTile", model=spy.on(ours(model)), tile_size=1, swap_size=2)
    sample(comfy_host, tiled, steps=1, batch=2)
    (a,) = spy.attended
    own = KV(a.k.reshape(16, -1, a.k.shape[-1]), a.v.reshape(16, -1, a.v.shape[-1]))
    plain = naive_attention(a.q, own, [], a.heads)
    changed = [not torch.allclose(x.double(), y, atol=1e-4) for x, y in zip(a.out, plain, strict=True)]
    conditional = a.options["cond_or_uncond"].index(0)
    assert changed == [row // 8 == conditional for row in range(16)]


def bank_of_first(host, model, ours) -> KV:
    """What the reference hands over at the first self-attention, taken from what the kernel gets."""
    return KV(*given_to_kernel(host, model, ours)[FIRST_BANK])


def given_to_kernel(host, model, ours, **inputs) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every call of the kernel for a step without guidance."""
    given = []

    def override(kernel, q, k, v, *args, **kwargs):
        if k.shape[1] in (64, 16):  # not the text
            given.append((k, v))
        return kernel(q, k, v, *args, **kwargs)

    sample(host, ours(with_override(model, override)), steps=1, cfg=1.0, **inputs)
    return given


def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def test_others_are_told_the_rows_of_a_reference_and_that_they_are_conditional(comfy_host, model):
    """Kernels and modules of other packs go by these options; the rows of the drawing are others."""
    from sa_inject.nodes.host.drawing.sampling_run import RUN_KEY  # pyright: ignore[reportMissingImports]

    shown = []

    def override(kernel, q, k, v, *args, transformer_options, **kwargs):
        if RUN_KEY not in transformer_options:
            shown.append((len(q), transformer_options["cond_or_uncond"], transformer_options["sigmas"].shape))
        return kernel(q, k, v, *args, transformer_options=transformer_options, **kwargs)

    prompt = make_prompt(*[(8, 8)] * 3)
    sample(comfy_host, apply(comfy_host, with_override(model, override), make_adapter(model), prompt), steps=1, batch=2)
    assert {rows for rows, *_ in shown} == {3}
    assert all(kinds == [0] and shape == (rows,) for rows, kinds, shape in shown)


def test_token_merging_merges_queries_only(comfy_host, model, ours, log, both_stay):
    def tome(given):
        return comfy_host.execute("TomePatchModel", model=given, ratio=0.5)[0]

    both_stay(tome)
    spy = Spy(keys=(FIRST,))
    sample(comfy_host, spy.on(ours(tome(model))), steps=1, cfg=1.0)
    (a,) = spy.attended
    assert a.q.shape[1] < a.k.shape[1] == 64
    expected = naive_attention(a.q, KV(a.k, a.v), [(bank_of_first(comfy_host, model, ours), 1.0)], a.heads)
    assert relative_error(a.out, expected) < 1e-5
    assert log() == []


@pytest.mark.parametrize(
    "node_id, widgets",
    [("HyperTile", {"tile_size": 1, "swap_size": 2}), ("TomePatchModel", {"ratio": 0.5})],
)
def test_area_steps_aside_where_tokens_are_not_where_they_were(comfy_host, model, log, node_id, widgets):
    """In the layers of full size; the area still acts in the others."""
    area = torch.ones(1, 64, 64)
    area[:, :32] = 0
    spy = Spy()
    (patched,) = comfy_host.execute(node_id, model=spy.on(apply(comfy_host, model, attn_mask=area)), **widgets)
    sample(comfy_host, patched, steps=1, cfg=1.0)
    reason = "tokens were merged or tiled there, so attn_mask cannot be placed"
    assert log() == [f"SA-Inject skipped injection in input 1.0, output 3.0: {reason}."]
    assert [str(a.key) for a in spy.attended if a.k.shape[1] == 16 and a.injected_rows() == [0]] == [
        "input 3.0",
        "middle 0.0",
        "output 1.0",
    ]


def test_free_u_stays(comfy_host, model, log, monkeypatch, both_stay):
    """FreeU knows layers by their width, which in the tiny checkpoint is a quarter of the real one's."""
    monkeypatch.setitem(model.model.model_config.unet_config, "model_channels", 80)

    def free_u(given):
        return comfy_host.execute("FreeU_V2", model=given)[0]

    both_stay(free_u)
    assert log() == []


@pytest.fixture(scope="module")
def control_net(model):
    """A real ControlNet: the encoder of the tiny UNet, and random weights for what a ControlNet has besides."""
    import comfy.controlnet

    unet = model.model.diffusion_model.state_dict()
    with torch.inference_mode():
        weights = {
            name: tensor.clone()
            for name, tensor in unet.items()
            if name.startswith(("time_embed", "input_blocks", "middle_block"))
        }
        ends = [f"zero_convs.{i}.0" for i in range(len(model.model.diffusion_model.input_blocks))]
        for place, name in enumerate((*ends, "middle_block_out.0")):
            weights[f"{name}.weight"] = random(320, 320, 1, 1, seed=place) * 320**-0.5
            weights[f"{name}.bias"] = torch.zeros(320)
        widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
        for place, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            weights[f"input_hint_block.{2 * place}.weight"] = random(n_out, n_in, 3, 3, seed=place) * (9 * n_in) ** -0.5
            weights[f"input_hint_block.{2 * place}.bias"] = torch.zeros(n_out)
        return comfy.controlnet.load_controlnet_state_dict(weights)


def controlled(comfy_host: Any, model: Any, control_net: Any, strength: float) -> dict[str, Any]:
    texts = {"positive": conditioning(model, 11), "negative": conditioning(model, 22)}
    if strength == 0:
        return texts
    hint = random(1, 64, 64, 3).sigmoid()
    outputs = comfy_host.execute(
        "ControlNetApplyAdvanced", **texts, control_net=control_net, image=hint, strength=strength
    )
    return dict(zip(texts, outputs, strict=True))


def test_control_net_stays_and_its_picture_is_not_given_to_the_reference(comfy_host, model, ours, log, control_net):
    with_control, without = (controlled(comfy_host, model, control_net, strength) for strength in (1.0, 0.0))
    plain, alone = (sample(comfy_host, model, **inputs) for inputs in (without, with_control))
    mine, both = (sample(comfy_host, ours(model), **inputs) for inputs in (without, with_control))
    assert both.isfinite().all()
    assert relative_error(alone, plain) > VISIBLE
    assert relative_error(both, alone) > VISIBLE
    assert relative_error(both, mine) > VISIBLE
    # Keys of the reference at the last layer below the skip connections: last of the calls at its size.
    last = [
        [k for k, _ in given_to_kernel(comfy_host, model, ours, **inputs) if k.shape[1] == 16][-1]
        for inputs in (with_control, without)
    ]
    assert torch.equal(*last)
    assert log() == []


def test_control_net_keeps_a_noised_reference_out_of_the_call_that_draws(comfy_host, model, control_net):
    """What it adds has as many rows as the drawing; the host leaves it away where they do not agree."""
    inputs, adapter = controlled(comfy_host, model, control_net, 1.0), make_adapter(model, "noised")
    watched = model.clone()
    watched.set_model_attn2_output_patch(lambda out, options: out)  # keeps the pictures out as well
    found, apart = (sample(comfy_host, apply(comfy_host, given, adapter), **inputs) for given in (model, watched))
    assert relative_error(found, apart) < 1e-4
    plain = sample(comfy_host, apply(comfy_host, model, adapter), **controlled(comfy_host, model, control_net, 0.0))
    assert relative_error(found, plain) > VISIBLE


@pytest.mark.parametrize("depth", [-1, 0], ids=["key of the block", "key with the depth"])
def test_a_replacement_of_another_pack_is_called_and_stays(comfy_host, model, ours, log, depth, both_stay):
    def replaced(given):
        return comfy_host.execute("ProbeReplaceAttn1", model=given, stage="input", index=1, depth=depth, scale=-1.0)[0]

    together = both_stay(replaced)
    assert set(log()) == {f"SA-Inject skipped injection in input 1.0: {REPLACED}."}
    spy = Spy()
    assert torch.equal(sample(comfy_host, spy.on(ours(replaced(model)))), together)
    for a in spy.attended:
        if a.key == FIRST:
            assert relative_error(a.out, -naive_attention(a.q, KV(a.k, a.v), [], a.heads)) < 1e-5
        else:
            assert a.injected_rows() == a.rows_that_read(conditioning(model, 11))


def test_a_replacement_is_called_with_the_keys_and_values_it_knows(comfy_host, model, ours):
    """It may return v or need a square map, so it gets nothing longer; and it is not called for the reference pass."""
    calls = []

    def replacement(q, k, v, options):
        calls.append((q.shape, k.shape, v.shape))
        return v

    for order in ("before", "after"):
        patched = model.clone() if order == "before" else ours(model)
        patched.set_model_attn1_replace(replacement, "output", 1)
        calls.clear()
        sample(comfy_host, ours(patched) if order == "before" else patched)
        assert calls == [(torch.Size((2, 16, 320)),) * 3] * 2


def test_replacements_everywhere_leave_only_themselves(comfy_host, model, ours, log):
    patched = model.clone()
    for key in make_adapter(model).blocks():
        patched.set_model_attn1_replace(lambda q, k, v, options: v, *key)
    assert torch.equal(sample(comfy_host, ours(patched)), sample(comfy_host, patched))
    (line,) = log()
    assert "input 1.0, input 3.0, middle 0.0, output 1.0, output 3.0" in line


class ImageAdapter:
    """A cross-attention replacement as IPAdapter writes it: an object that holds tensors."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        heads = extra_options["n_heads"]
        tokens = self.tokens.to(q).expand(len(q), -1, -1)
        return optimized_attention(q, k, v, heads) + optimized_attention(q, tokens, tokens, heads)


def test_cross_attention_replacements_stay(model, log, both_stay):
    def image_adapter(given):
        given = given.clone()
        for key in make_adapter(model).blocks():
            given.set_model_attn2_replace(ImageAdapter(random(1, 4, 320)), *key)
        return given

    both_stay(image_adapter)
    assert log() == []


def test_attention_kernels_of_another_pack_serve_our_attention(comfy_host, model, ours, injected):
    """For our own call in every injected layer, and for the reference pass."""
    shapes = []

    def override(kernel, q, k, v, *args, **kwargs):
        shapes.append((*q.shape[:2], k.shape[1]))
        return kernel(q, k, v, *args, **kwargs)

    for order in (lambda: with_override(ours(model), override), lambda: ours(with_override(model, override))):
        shapes.clear()
        assert torch.equal(sample(comfy_host, order()), injected)
        steps, layers = 2, 2  # two of the five have the size of the picture
        assert shapes.count((2, 64, 64)) == steps * layers
        # The conditional row to the reference, and in the reference pass every layer but the last, which is not needed.
        assert shapes.count((1, 64, 64)) == steps * layers + 1
        assert not any(q == k for _, q, k in shapes if (q, k) not in {(64, 64), (16, 16)})


def test_attention_kernels_of_another_pack_change_both_passes(both_stay):
    def colder(kernel, q, k, v, *args, **kwargs):
        return kernel(0.5 * q, k, v, *args, **kwargs)

    both_stay(lambda given: with_override(given, colder))


def test_patches_before_the_projections_stay(log, both_stay):
    """A hypernetwork: an attn1_patch on what becomes k and v, and an attn1_output_patch."""

    def hypernetwork(given):
        given = given.clone()
        given.set_model_attn1_patch(lambda q, k, v, options: (q, 1.5 * k, 0.5 * v))
        given.set_model_attn1_output_patch(lambda out, options: 0.8 * out)
        return given

    both_stay(hypernetwork)
    assert log() == []


def test_a_wrapper_that_hands_over_options_by_name_is_understood(comfy_host, model, ours, injected):
    """Both spellings of a UNet call, from a wrapper of another pack around ours."""
    from comfy.patcher_extension import WrappersMP

    def named(executor, x, timestep, context, y=None, control=None, transformer_options=None, **kwargs):
        return executor(x, timestep, context=context, y=y, transformer_options=transformer_options, **kwargs)

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", named)
    assert torch.equal(sample(comfy_host, ours(other)), injected)
