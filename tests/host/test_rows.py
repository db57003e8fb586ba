"""Which rows, tokens, steps and parts of the picture see the reference, for every way in which a UNet gets called."""

import logging
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sa_inject.core.kv import KV  # pyright: ignore[reportMissingImports]
from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    base_model,
    call_unet,
    conditioning,
    load,
    make_adapter,
    make_prompt,
    naive_attention,
    random,
    reference_text,
    relative_error,
    sample,
)

SIGMA = 5.0


@pytest.fixture(scope="module")
def positive(model):
    return conditioning(model, 11)


@pytest.fixture(scope="module")
def negative(model):
    return conditioning(model, 22)


def combined(host, *conds):
    joined = conds[0]
    for cond in conds[1:]:
        (joined,) = host.execute("ConditioningCombine", conditioning_1=joined, conditioning_2=cond)
    return joined


def in_area(host, cond, width: int, height: int, x: int, y: int):
    """Sizes in pixels."""
    return host.execute("ConditioningSetArea", conditioning=cond, width=width, height=height, x=x, y=y, strength=1.0)[0]


def assert_only_rows_that_read(spy: Spy, *conds) -> None:
    """In every UNet call exactly the rows of these texts are injected."""
    assert spy.calls
    seen = [a for a in spy.attended if a.key == FIRST]
    for a in seen:
        assert a.injected_rows() == sorted(row for cond in conds for row in a.rows_that_read(cond))
    for call in spy.calls:
        if not any(a.context is call["context"] for a in seen):  # nothing was replaced in this call
            assert not any(torch.equal(row, cond[0][0][0]) for row in call["context"] for cond in conds)


@pytest.mark.parametrize("apply_to", ["positive", "both"])
@pytest.mark.parametrize("chunks", [[0, 1], [1, 0], [0], [1], None])
def test_rows_of_a_batch_of_four_are_mapped_to_their_chunks(comfy_host, model, chunks, apply_to):
    """Injected rows change; the others come out of the whole UNet bit for bit as without us."""
    count = len(chunks or [0])
    x = random(4 * count, 4, 8, 8) * SIGMA
    context = torch.cat([reference_text(model, seed).cross_attn.expand(4, -1, -1) for seed in range(count)])
    patched = apply(comfy_host, model, apply_to=apply_to)
    plain = call_unet(load(model), x, SIGMA, context, chunks)
    found = call_unet(load(patched), x, SIGMA, context, chunks)
    for place, chunk in enumerate(chunks or [0]):
        for row in range(4 * place, 4 * place + 4):
            if chunk == 0 or apply_to == "both":
                assert relative_error(found[row], plain[row]) > 1e-3
            else:
                assert torch.equal(found[row], plain[row])


def test_order_and_number_of_chunks_change_nothing(comfy_host, model):
    """Conditional and unconditional together, the other way round, or each in a call of its own."""
    patched = load(apply(comfy_host, model))
    x = random(2, 4, 8, 8) * SIGMA
    cond, uncond = (reference_text(model, seed).cross_attn for seed in (1, 2))
    whole = call_unet(patched, torch.cat([x, x]), SIGMA, torch.cat([cond, cond, uncond, uncond]), [0, 1])
    swapped = call_unet(patched, torch.cat([x, x]), SIGMA, torch.cat([uncond, uncond, cond, cond]), [1, 0])
    alone = [call_unet(patched, x, SIGMA, torch.cat([c, c]), [i]) for i, c in enumerate((cond, uncond))]
    assert relative_error(swapped, torch.cat([whole[2:], whole[:2]])) < 1e-5
    assert relative_error(torch.cat(alone), whole) < 1e-5


@pytest.mark.parametrize("cfg, tokens", [(4.0, 7), (4.0, 5), (1.0, 7)], ids=["together", "separate calls", "cfg 1"])
def test_only_the_positive_rows_of_a_batch_are_injected(comfy_host, model, positive, cfg, tokens):
    negative = conditioning(model, 22, tokens=tokens)  # 5 and 7 tokens do not go into one call
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, model))
    samples = sample(comfy_host, patched, batch=4, positive=positive, negative=negative, cfg=cfg)
    rows = {(4.0, 7): 8, (4.0, 5): 4, (1.0, 7): 4}[cfg, tokens]
    assert {len(call["x"]) for call in spy.calls} == {rows}
    assert len(spy.calls) == (4 if tokens == 5 else 2)
    assert_only_rows_that_read(spy, positive)
    assert samples.isfinite().all()


def test_both_injects_the_negative_rows_too(comfy_host, model, positive, negative):
    spy = Spy(keys=(FIRST,))
    sample(comfy_host, spy.on(apply(comfy_host, model, apply_to="both")), positive=positive, negative=negative)
    assert_only_rows_that_read(spy, positive, negative)


def test_areas_of_different_sizes_are_injected_in_their_own_calls(comfy_host, model, positive, negative):
    second = conditioning(model, 33)
    left = in_area(comfy_host, positive, width=64, height=64, x=0, y=0)
    right = in_area(comfy_host, second, width=64, height=32, x=64, y=32)
    inputs = {"positive": combined(comfy_host, left, right), "negative": negative, "size": (8, 16)}
    spy = Spy(keys=(FIRST,))
    found = sample(comfy_host, spy.on(apply(comfy_host, model)), **inputs)
    assert {tuple(call["x"].shape[-2:]) for call in spy.calls} >= {(8, 8), (4, 8)}
    assert_only_rows_that_read(spy, positive, second)
    assert found.isfinite().all()
    assert relative_error(found, sample(comfy_host, model, **inputs)) > 1e-3


def test_guiders_with_the_positive_elsewhere_are_mapped_by_the_text(comfy_host, model, positive, negative):
    """DualCFGGuider hands over negative, second and first text in this order."""
    middle = conditioning(model, 33)
    spy = Spy(keys=(FIRST,))
    (guider,) = comfy_host.execute(
        "DualCFGGuider",
        model=spy.on(apply(comfy_host, model)),
        cond1=positive,
        cond2=middle,
        negative=negative,
        cfg_conds=3.0,
        cfg_cond2_negative=2.0,
    )
    sample_with_guider(comfy_host, model, guider)
    assert {len(call["x"]) for call in spy.calls} == {3}
    assert_only_rows_that_read(spy, positive)


def test_a_pass_of_the_negative_alone_is_not_injected(comfy_host, model, positive, negative):
    """Self-attention guidance runs the negative once more, by itself, where the positive usually stands."""
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, model))
    (patched,) = comfy_host.execute("SelfAttentionGuidance", model=patched)
    sample(comfy_host, patched, positive=positive, negative=negative)
    assert [len(call["x"]) for call in spy.calls] == [2, 1, 2, 1]
    assert_only_rows_that_read(spy, positive)


def sample_with_guider(host, model, guider, sampler="euler", size=(8, 8)):
    """What SamplerCustomAdvanced draws, with the noise and the steps of `sample`."""
    return host.execute(
        "SamplerCustomAdvanced",
        noise=host.execute("RandomNoise", noise_seed=1)[0],
        guider=guider,
        sampler=host.execute("KSamplerSelect", sampler_name=sampler)[0],
        sigmas=host.execute("BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0)[0],
        latent_image={"samples": torch.zeros(1, 4, *size)},
    )[0]["samples"]


def test_custom_samplers_draw_what_the_ksampler_draws(comfy_host, model, positive, negative):
    patched = apply(comfy_host, model, make_adapter(model, "noised"))
    expected = sample(comfy_host, patched, positive=positive, negative=negative, scheduler="simple")
    (guider,) = comfy_host.execute("CFGGuider", model=patched, positive=positive, negative=negative, cfg=4.0)
    assert torch.equal(sample_with_guider(comfy_host, model, guider), expected)
    (basic,) = comfy_host.execute("BasicGuider", model=patched, conditioning=positive)
    expected = sample(comfy_host, patched, positive=positive, negative=negative, scheduler="simple", cfg=1.0)
    assert torch.equal(sample_with_guider(comfy_host, model, basic), expected)


def unet_calls(model, spy: Spy, draw) -> tuple[int, int]:
    """How often the UNet ran for a sampler, and how often for a reference pass."""
    calls = []
    first = model.model.diffusion_model.input_blocks[0][0]
    hook = first.register_forward_hook(lambda module, inputs, out: calls.append(len(out)))
    draw()
    hook.remove()
    return len(spy.calls), len(calls) - len(spy.calls)


class Drawn(NamedTuple):
    drawn: Tensor
    rows: list[int]  # of every call of the UNet, reference passes too


def count_unet_rows(model, draw) -> Drawn:
    rows: list[int] = []
    first = model.model.diffusion_model.input_blocks[0][0]
    hook = first.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    try:
        return Drawn(draw(), rows)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "mode, sampler, passes", [("clean", "euler", 1), ("noised", "euler", 3), ("noised", "heun", 3)]
)
def test_the_picture_is_read_once_a_run_or_once_a_noise_level(comfy_host, model, mode, sampler, passes):
    """heun calls the UNet twice a step, the second time at the next step's level; cond and uncond come separately."""
    spy = Spy(keys=())
    patched = spy.on(apply(comfy_host, model, make_adapter(model, mode), make_prompt((8, 8))))
    negative = conditioning(model, 22, tokens=5)
    found = unet_calls(
        model, spy, lambda: sample(comfy_host, patched, steps=3, sampler_name=sampler, negative=negative)
    )
    assert found == ({"euler": 6, "heun": 10}[sampler], passes)


@pytest.fixture
def looked_at():
    """A model in whose UNet calls another pack has a patch that changes nothing."""

    def patched(model):
        model = model.clone()
        model.set_model_attn2_output_patch(lambda out, options: out)
        return model

    return patched


@pytest.mark.parametrize("kind", ["sd15", "sd2_v", "sdxl"])
@pytest.mark.parametrize("apply_to", ["positive", "both"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_pictures_that_are_rows_of_the_call_say_what_a_pass_of_their_own_says(
    comfy_host, looked_at, kind, apply_to, sampler
):
    model = base_model(comfy_host, kind)
    mask = torch.zeros(8, 8)
    mask[:, 2:5] = 1
    prompt = make_prompt((8, 8), (8, 8), masks=(None, mask))
    patched = apply(comfy_host, model, make_adapter(model, "noised"), prompt, apply_to=apply_to)
    together = {"batch": 2, "steps": 3, "sampler_name": sampler}
    calls = count_unet_rows(model, lambda: sample(comfy_host, patched, **together))
    apart = count_unet_rows(model, lambda: sample(comfy_host, looked_at(patched), **together))
    levels = 3  # heun comes to two of them twice, and finds what the pictures said there
    assert calls.rows == [6] * levels if sampler == "euler" else sorted(calls.rows) == [4] * 2 + [6] * levels
    assert sorted(apart.rows) == [2] * levels + [4] * len(calls.rows)
    assert relative_error(calls.drawn, apart.drawn) < 1e-4
    plain = sample(comfy_host, model, **together)
    assert relative_error(calls.drawn, plain) > 0.01


def test_pictures_get_a_pass_of_their_own_where_there_is_no_room_for_both(comfy_host, model, monkeypatch):
    from sa_inject.nodes.host.drawing import reference_pass  # pyright: ignore[reportMissingImports]

    patched = apply(comfy_host, model, make_adapter(model, "noised"))
    together = count_unet_rows(model, lambda: sample(comfy_host, patched))
    needed = model.model.memory_required([3, 4, 8, 8]) * 1.5
    monkeypatch.setattr(reference_pass, "get_free_memory", lambda device: needed)
    apart = count_unet_rows(model, lambda: sample(comfy_host, patched))
    assert together.rows == [3, 3] and apart.rows == [1, 2, 1, 2]
    assert relative_error(together.drawn, apart.drawn) < 1e-4


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_pictures_are_read_one_by_one_where_there_is_no_room_for_more(comfy_host, model, looked_at, monkeypatch, mode):
    from sa_inject.nodes.host.drawing import reference_pass  # pyright: ignore[reportMissingImports]

    prompt = make_prompt((8, 8), (8, 16), (8, 8))
    patched = looked_at(apply(comfy_host, model, make_adapter(model, mode), prompt))
    together = count_unet_rows(model, lambda: sample(comfy_host, patched, steps=1))
    monkeypatch.setattr(reference_pass, "get_free_memory", lambda device: model.model.memory_required([1, 4, 8, 8]))
    apart = count_unet_rows(model, lambda: sample(comfy_host, patched, steps=1))
    assert together.rows == [2, 1, 2] and apart.rows == [1, 1, 1, 2]
    assert relative_error(together.drawn, apart.drawn) < 1e-4


@pytest.mark.parametrize("batch, further, rows", [(1, (8, 16), [2, 2, 1]), (2, (16, 24), [4, 1])])
def test_pictures_read_once_are_read_in_calls_no_larger_than_the_one_that_draws(
    comfy_host, model, batch, further, rows
):
    """Drawing takes two rows of 8x8 for each picture of the batch; one reference of 16x24 is larger than that alone."""
    patched = apply(comfy_host, model, make_adapter(model, "clean"), make_prompt(*[(8, 8)] * 4, further))
    calls = count_unet_rows(model, lambda: sample(comfy_host, patched, steps=1, batch=batch))
    assert calls.rows == [*rows, 2 * batch]


def test_masked_out_tokens_are_let_go_layer_by_layer(comfy_host, model, monkeypatch):
    """Not when the reading is over: until then the keys and values of all layers would be held whole."""
    from sa_inject.nodes.host.drawing import reference_pass  # pyright: ignore[reportMissingImports]

    whole, alive, select = [], [], reference_pass.split_per_image

    def watched(recorded, pictures):
        whole.append(weakref.ref(recorded.kv.k))
        alive.append(sum(tensor() is not None for tensor in whole))
        return select(recorded, pictures)

    monkeypatch.setattr(reference_pass, "split_per_image", watched)
    quarter = torch.zeros(8, 8)
    quarter[:4, :4] = 1
    prompt = make_prompt(*[(8, 8)] * 4, masks=(quarter,) * 4)
    sample(comfy_host, apply(comfy_host, model, make_adapter(model, "clean"), prompt), steps=1)
    assert len(alive) == 2 * len(make_adapter(model).blocks()), "two calls of two pictures"
    assert set(alive) == {1}


@pytest.mark.parametrize("size, tokens, rows", [((8, 8), 14, {3}), ((8, 8), 10, {1, 2}), ((8, 16), 7, {1, 2})])
def test_pictures_are_rows_of_a_call_only_if_size_and_text_fit(comfy_host, model, size, tokens, rows):
    texts = {name: conditioning(model, seed, tokens) for name, seed in (("positive", 11), ("negative", 22))}
    patched = apply(comfy_host, model, make_adapter(model, "noised"), make_prompt((8, 8)))
    assert set(count_unet_rows(model, lambda: sample(comfy_host, patched, size=size, **texts)).rows) == rows


def test_a_second_run_reads_the_picture_again(comfy_host, model):
    spy = Spy(keys=())
    patched = spy.on(apply(comfy_host, model))
    for _ in range(2):
        spy.calls.clear()
        assert unet_calls(model, spy, lambda: sample(comfy_host, patched)) == (2, 1)


def test_chained_nodes_add_up_in_their_order(comfy_host, model):
    """The formula with both references, each in a softmax of its own."""
    adapters = [make_adapter(model, seed=seed) for seed in (0, 50)]
    prompts = [make_prompt((8, 8), seed=0), make_prompt((8, 16), seed=50)]
    text = reference_text(model, 5).cross_attn
    x = random(1, 4, 8, 8) * SIGMA
    banks = []
    for adapter, prompt in zip(adapters, prompts, strict=True):
        _, (bank,) = first_attention(apply(comfy_host, model, adapter, prompt), x, text)
        banks.append(bank)
    for first, second in ((0, 1), (1, 0)):
        once = apply(comfy_host, model, adapters[first], prompts[first])
        attended, found = first_attention(apply(comfy_host, once, adapters[second], prompts[second]), x, text)
        own = KV(attended.k, attended.v)
        references = [(banks[place], 1.0) for place in (first, second)]
        assert relative_error(attended.out, naive_attention(attended.q, own, references, attended.heads)) < 1e-5
        assert [kv.k.shape for kv in found] == [banks[first].k.shape, banks[second].k.shape]
    weighted = apply(comfy_host, once, adapters[0], prompts[0], strength=0.5)
    attended, _ = first_attention(weighted, x, text)
    references = [(banks[1], 1.0), (banks[0], 0.5)]
    expected = naive_attention(attended.q, KV(attended.k, attended.v), references, attended.heads)
    assert relative_error(attended.out, expected) < 1e-5


def first_attention(patched, x, text):
    """The first self-attention of one UNet call, and what every reference handed over there."""
    from sa_inject.nodes.host.drawing.patch import RUN_KEY, SamplingRun  # pyright: ignore[reportMissingImports]

    spy, run = Spy(keys=(FIRST,)), SamplingRun()
    call_unet(load(spy.on(patched)), x, SIGMA, text, [0], **{RUN_KEY: run})
    (attended,) = spy.attended
    return attended, [bank[FIRST] for bank in run.banks.values()]


def test_chained_nodes_act_in_their_own_rows_and_steps(comfy_host, model, positive, negative):
    spy = Spy(keys=(FIRST,))
    patched = apply(comfy_host, model, end_percent=0.5)
    patched = spy.on(apply(comfy_host, patched, make_adapter(model, seed=50), start_percent=0.5, apply_to="both"))
    sample(comfy_host, patched, positive=positive, negative=negative, steps=2, scheduler="simple")
    early, late = spy.attended
    assert early.injected_rows() == early.rows_that_read(positive)
    assert late.injected_rows() == [0, 1]


def test_pictures_of_one_prompt_share_the_weight_of_one(comfy_host, model):
    """Three times the same picture weigh as much as that picture once."""
    picture = make_prompt().pictures[0]
    x, text = random(1, 4, 8, 8) * SIGMA, reference_text(model, 5).cross_attn
    once, three, stronger = (
        first_attention(
            apply(comfy_host, model, prompt=type(make_prompt())((picture,) * n), strength=strength), x, text
        )
        for n, strength in ((1, 0.9), (3, 0.9), (3, 2.7))
    )
    assert [found[0].k.shape[1] for _, found in (once, three)] == [64, 3 * 64]
    assert relative_error(three[0].out, once[0].out) < 1e-5
    assert relative_error(stronger[0].out, once[0].out) > 1e-2


def test_masked_out_tokens_are_not_in_the_list(comfy_host, model):
    """A mask of the right half of one picture of two, at both levels of the UNet."""
    from sa_inject.nodes.host.drawing.patch import RUN_KEY, SamplingRun  # pyright: ignore[reportMissingImports]

    mask = torch.zeros(64, 64)
    mask[:, 32:] = 1
    x, text = random(1, 4, 8, 8) * SIGMA, reference_text(model, 5).cross_attn
    banks = []
    for masks in ((None, None), (mask, None), (torch.zeros(64, 64), None)):
        run = SamplingRun()
        patched = load(apply(comfy_host, model, prompt=make_prompt((8, 8), (8, 8), masks=masks)))
        call_unet(patched, x, SIGMA, text, [0], **{RUN_KEY: run})
        banks.extend(run.banks.values())
    whole, masked, black = banks
    for key in whole:
        n = whole[key].k.shape[1] // 2
        side = int(n**0.5)
        assert side in (8, 4)
        kept = torch.arange(n).reshape(side, side)[:, side // 2 :].flatten()
        for both, halved in zip(whole[key], masked[key], strict=True):
            assert torch.equal(halved, torch.cat([both[:, :n][:, kept], both[:, n:]], dim=1))
        assert black[key].k.shape[1] == n + 1  # the last token of a subject is never lost


def test_queries_outside_the_area_see_nothing(comfy_host, model):
    area = torch.zeros(1, 32, 32)
    area[:, 16:] = 1.0
    area[:, 16:, 16:] = 0.5
    x, text = random(2, 4, 8, 8) * SIGMA, reference_text(model, 5).cross_attn.expand(2, -1, -1)
    _, (bank,) = first_attention(apply(comfy_host, model), x, text)
    masked, _ = first_attention(apply(comfy_host, model, attn_mask=area, strength=0.8), x, text)
    own = KV(masked.k, masked.v)
    weights = 0.8 * area[0, ::4, ::4].flatten()
    assert sorted(set(weights.tolist())) == pytest.approx([0.0, 0.4, 0.8])
    assert relative_error(masked.out, naive_attention(masked.q, own, [(bank, weights)], masked.heads)) < 1e-5
    plain = naive_attention(masked.q, own, [], masked.heads)
    assert relative_error(masked.out[:, :32], plain[:, :32]) < 1e-5
    assert relative_error(masked.out[:, 32:], plain[:, 32:]) > 1e-2


def test_chained_nodes_have_areas_of_their_own(comfy_host, model):
    """The left half is given the first reference alone, the right half the second."""
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1.0
    adapters, x = [make_adapter(model, seed=seed) for seed in (0, 50)], random(1, 4, 8, 8) * SIGMA
    text = reference_text(model, 5).cross_attn
    once = apply(comfy_host, model, adapters[0], attn_mask=left)
    attended, banks = first_attention(apply(comfy_host, once, adapters[1], attn_mask=1 - left), x, text)
    references = [(banks[0], left.flatten()), (banks[1], 1 - left.flatten())]
    expected = naive_attention(attended.q, KV(attended.k, attended.v), references, attended.heads)
    assert relative_error(attended.out, expected) < 1e-5


def test_black_area_draws_the_base_models_picture(comfy_host, model):
    black = sample(comfy_host, apply(comfy_host, model, attn_mask=torch.zeros(1, 8, 8)))
    assert relative_error(black, sample(comfy_host, model)) < 1e-4


def test_area_steps_aside_where_only_a_part_of_the_picture_is_drawn(comfy_host, model, positive, negative, caplog):
    """A call on a crop does not say where the crop lies, so the mask cannot be placed; other injections stay."""
    second = conditioning(model, 33)
    part = in_area(comfy_host, second, width=64, height=64, x=64, y=0)
    inputs = {"positive": combined(comfy_host, positive, part), "negative": negative, "size": (8, 16)}
    area = torch.ones(1, 64, 128)
    spy = Spy(keys=(FIRST,))
    with caplog.at_level(logging.INFO):
        sample(comfy_host, spy.on(apply(comfy_host, model, attn_mask=area)), **inputs)
    assert_only_rows_that_read(spy, positive)
    (line,) = [r.getMessage() for r in caplog.records if "skipped injection" in r.getMessage()]
    assert "attn_mask" in line and "part of the picture" in line

    caplog.clear()
    spy = Spy(keys=(FIRST,))
    with caplog.at_level(logging.INFO):
        sample(comfy_host, spy.on(apply(comfy_host, model)), **inputs)
    assert_only_rows_that_read(spy, positive, second)
    assert "skipped injection" not in caplog.text


def test_area_steps_aside_in_tiled_calls(comfy_host, model, positive, negative, caplog):
    """What tiled diffusion does: a model_function_wrapper that draws the picture in two halves."""

    def halves(apply_model, call):
        parts = zip(call["input"].chunk(2, dim=-1), [call["timestep"]] * 2, strict=True)
        return torch.cat([apply_model(x, t, **call["c"]) for x, t in parts], dim=-1)

    inputs = {"positive": positive, "negative": negative, "size": (8, 16)}
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(halves)
    spy = Spy(keys=(FIRST,))
    with caplog.at_level(logging.INFO):
        sample(comfy_host, spy.on(apply(comfy_host, tiled)), **inputs)
    assert {call["x"].shape[-1] for call in spy.calls} == {8}
    assert_only_rows_that_read(spy, positive)
    assert "skipped injection" not in caplog.text
    with caplog.at_level(logging.INFO):
        found = sample(comfy_host, apply(comfy_host, tiled, attn_mask=torch.ones(1, 64, 128)), **inputs)
    assert torch.equal(found, sample(comfy_host, tiled, **inputs))
    assert "skipped injection" in caplog.text
