"""Other nodes put rows of their own into a UNet call: each row sees the reference that reads the positive prompt."""

import pytest
import torch

from sa_inject.core.kv import KV  # pyright: ignore[reportMissingImports]
from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    base_model,
    conditioning,
    make_adapter,
    naive_attention,
    random,
    relative_error,
    sample,
)
from tests.host.test_rows import assert_only_rows_that_read, combined, sample_with_guider

ORDERS = ["tiles", "chunks", "one by one", "reversed"]  # of ProbeTiles


@pytest.fixture(scope="module")
def texts(model):
    return {"positive": conditioning(model, 11), "negative": conditioning(model, 22)}


def tiled(host, model, order: str = "tiles", tiles_in_a_call: int = 2):
    return host.execute("ProbeTiles", model=model, width=8, tiles_in_a_call=tiles_in_a_call, order=order)[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode, tiles, batch", [("clean", 1, 1), ("clean", 2, 1), ("noised", 3, 1), ("noised", 2, 2)])
def test_rows_of_tiles_are_known_by_what_they_read(comfy_host, model, texts, log, order, mode, tiles, batch):
    """Three tiles in calls of up to so many, so the last call may be smaller."""
    spy = Spy(keys=(FIRST,))
    patched = apply(comfy_host, tiled(comfy_host, model, order, tiles), make_adapter(model, mode))
    sample(comfy_host, spy.on(patched), size=(8, 24), batch=batch, steps=1, **texts)
    assert_only_rows_that_read(spy, texts["positive"])
    assert log() == []


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_tiles_in_one_call_are_drawn_as_tiles_in_calls_of_their_own(comfy_host, model, texts, mode):
    inputs, adapter = {"size": (8, 24), "batch": 2, **texts}, make_adapter(model, mode)
    found = [
        sample(comfy_host, apply(comfy_host, tiled(comfy_host, model, order, count), adapter, strength=0.6), **inputs)
        for order, count in (("one by one", 1), ("tiles", 3), ("tiles", 2), ("chunks", 3), ("reversed", 2))
    ]
    for other in found[1:]:
        assert relative_error(other, found[0]) < 1e-4
    assert relative_error(found[0], sample(comfy_host, tiled(comfy_host, model), **inputs)) > 1e-3


def test_scattered_rows_of_folded_tiles_are_those_of_the_positive(comfy_host, model, texts):
    """HyperTile turns every row of an attention into several, and other tiles lie between those that are injected."""
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, tiled(comfy_host, model)))
    (folded,) = comfy_host.execute("HyperTile", model=patched, tile_size=1, swap_size=2)
    sample(comfy_host, folded, size=(8, 16), steps=1, **texts)
    (a,) = spy.attended
    rows, fold = len(a.context), len(a.q) // len(a.context)
    assert rows == 4 and fold > 1
    own = KV(*(x.reshape(len(a.q), -1, x.shape[-1]) for x in (a.k, a.v)))
    plain = naive_attention(a.q, own, [], a.heads)
    changed = [not torch.allclose(x.double(), y, atol=1e-4) for x, y in zip(a.out, plain, strict=True)]
    wanted = a.rows_that_read(texts["positive"])
    assert wanted == [1, 3] or wanted == [0, 2]
    assert changed == [row // fold in wanted for row in range(len(a.q))]


@pytest.mark.parametrize("apply_to, cfg", [("both", 4.0), ("positive", 1.0), ("both", 1.0)])
def test_all_rows_of_tiles_where_all_see_it(comfy_host, model, texts, apply_to, cfg):
    spy = Spy(keys=(FIRST,))
    patched = apply(comfy_host, tiled(comfy_host, model), apply_to=apply_to)
    sample(comfy_host, spy.on(patched), size=(8, 24), steps=1, cfg=cfg, **texts)
    wanted = texts.values() if cfg > 1 else [texts["positive"]]
    assert_only_rows_that_read(spy, *wanted)


@pytest.mark.parametrize("lengths", [(14, 7), (7, 14), (10, 5)], ids=str)
def test_texts_that_were_repeated_to_one_length_are_known(comfy_host, model, lengths):
    """The short one is a part of the long one, so its first tokens alone would not tell."""
    long, short = (random(1, 14, 768, seed=3)[:, :n] for n in (max(lengths), min(lengths)))
    positive, negative = ([[text, {}]] for text in ((long, short) if lengths[0] > lengths[1] else (short, long)))
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, tiled(comfy_host, model)))
    sample(comfy_host, patched, positive=positive, negative=negative, size=(8, 16), steps=1)
    (a,) = spy.attended
    whole = positive[0][0][0].repeat(max(lengths) // lengths[0], 1)
    assert a.injected_rows() == [row for row, context in enumerate(a.context) if torch.equal(context, whole)]
    assert len(a.injected_rows()) == 2


def test_every_picture_of_a_batch_with_a_prompt_of_its_own_is_known(comfy_host, model):
    """Prompts by frame: a conditioning with a row for each picture."""
    prompts = [random(3, 7, 768, seed=seed) for seed in (1, 2)]
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, tiled(comfy_host, model)))
    texts = {name: [[text, {}]] for name, text in zip(("positive", "negative"), prompts, strict=True)}
    sample(comfy_host, patched, size=(8, 16), batch=3, steps=1, **texts)
    for a in spy.attended:
        reads = [any(torch.equal(row, text) for text in prompts[0]) for row in a.context]
        assert a.injected_rows() == [row for row, is_positive in enumerate(reads) if is_positive]


def test_sdxl_rows_with_one_text_are_known_by_their_pooled_vector(comfy_host):
    model = base_model(comfy_host, "sdxl")
    text = random(1, 7, 2048)
    texts = {
        name: [[text, {"pooled_output": random(1, 1280, seed=seed)}]]
        for seed, name in enumerate(("positive", "negative"))
    }
    found = [
        sample(comfy_host, apply(comfy_host, tiled(comfy_host, model, order)), size=(8, 16), steps=1, **texts)
        for order in ("chunks", "one by one")
    ]
    assert relative_error(*found) < 1e-4


@pytest.mark.parametrize("order", ["tiles", "reversed"])
def test_rows_with_one_text_are_known_by_their_place(comfy_host, model, texts, log, order):
    """An empty prompt on both sides. In another order than ComfyUI's nobody can tell; then the place has to do."""
    same = {"positive": texts["positive"], "negative": texts["positive"]}
    spy = Spy(keys=(FIRST,))
    sample(comfy_host, spy.on(apply(comfy_host, tiled(comfy_host, model, order))), size=(8, 16), steps=1, **same)
    (a,) = spy.attended
    kinds = a.options["cond_or_uncond"] * 2
    assert a.injected_rows() == [row for row, kind in enumerate(kinds) if kind == 0]


def test_ours_steps_aside_where_nothing_tells_the_rows_apart(comfy_host, model, texts, log):
    """Each row alone, and both prompts the same."""
    same = {"positive": texts["positive"], "negative": texts["positive"]}
    inputs = {"size": (8, 16), "steps": 1, **same}
    alone = tiled(comfy_host, model, "one by one")
    found = sample(comfy_host, apply(comfy_host, alone), **inputs)
    assert torch.equal(found, sample(comfy_host, alone, **inputs))
    (line,) = log()
    assert line.endswith("nothing tells which of their rows belong to the positive prompt.")


def test_guiders_with_more_texts_are_known_in_tiles(comfy_host, model, texts):
    middle = conditioning(model, 33)
    spy = Spy(keys=(FIRST,))
    (guider,) = comfy_host.execute(
        "DualCFGGuider",
        model=spy.on(apply(comfy_host, tiled(comfy_host, model))),
        cond1=texts["positive"],
        cond2=middle,
        negative=texts["negative"],
        cfg_conds=3.0,
        cfg_cond2_negative=2.0,
    )
    sample_with_guider(comfy_host, model, guider, size=(8, 16))
    assert {len(call["x"]) for call in spy.calls} == {6}
    assert_only_rows_that_read(spy, texts["positive"])


def test_combined_prompts_are_both_known_in_tiles(comfy_host, model, texts):
    second = conditioning(model, 33)
    spy = Spy(keys=(FIRST,))
    patched = spy.on(apply(comfy_host, tiled(comfy_host, model)))
    positive = combined(comfy_host, texts["positive"], second)
    sample(comfy_host, patched, size=(8, 16), positive=positive, negative=texts["negative"], steps=1)
    assert_only_rows_that_read(spy, texts["positive"], second)


@pytest.mark.parametrize("node_id", ["PerturbedAttentionGuidance", "SelfAttentionGuidance"])
def test_passes_of_guidance_nodes_are_known_in_tiles(comfy_host, model, texts, node_id):
    spy = Spy(keys=(FIRST,))
    (patched,) = comfy_host.execute(node_id, model=spy.on(apply(comfy_host, tiled(comfy_host, model))))
    sample(comfy_host, patched, size=(8, 16), steps=1, **texts)
    assert {len(call["x"]) for call in spy.calls} == {4, 2}
    assert_only_rows_that_read(spy, texts["positive"])


def test_a_function_put_over_apply_model_is_seen(comfy_host, model, texts, monkeypatch):
    """Some packs replace the method on the model instead of using the host's slots."""
    base, plain = model.model, type(model.model).apply_model

    def backwards(x, t, c_concat=None, c_crossattn=None, **kwargs):
        return plain(base, x.flip(0), t, None, c_crossattn.flip(0), **kwargs).flip(0)

    patched = apply(comfy_host, model)
    expected = sample(comfy_host, patched, steps=1, **texts)
    monkeypatch.setattr(base, "apply_model", backwards)
    spy = Spy(keys=(FIRST,))
    assert relative_error(sample(comfy_host, spy.on(patched), steps=1, **texts), expected) < 1e-4
    assert_only_rows_that_read(spy, texts["positive"])


@pytest.mark.parametrize("kind", ["APPLY_MODEL", "DIFFUSION_MODEL", "CALC_COND_BATCH"])
def test_wrappers_that_change_the_rows_are_seen(comfy_host, model, texts, kind):
    """The rows the other way round, from every place where the host lets others in before us."""
    from comfy.patcher_extension import WrappersMP

    def backwards(executor, x, t, *rest, **kwargs):
        turned = [part.flip(0) if isinstance(part, torch.Tensor) else part for part in (x, t, *rest)]
        return executor(*turned, **kwargs).flip(0)

    def untouched(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    other = model.clone()
    other.add_wrapper_with_key(
        getattr(WrappersMP, kind), "probe", untouched if kind == "CALC_COND_BATCH" else backwards
    )
    spy = Spy(keys=(FIRST,))
    found = sample(comfy_host, spy.on(apply(comfy_host, other)), steps=1, **texts)
    assert relative_error(found, sample(comfy_host, apply(comfy_host, model), steps=1, **texts)) < 1e-4
    assert_only_rows_that_read(spy, texts["positive"])


def test_row_that_reads_a_text_of_somebody_else_is_not_injected(comfy_host, model, texts):
    """A third row beside the two prompts: no order of ComfyUI's explains it, and its text is no prompt of the run."""
    from comfy.patcher_extension import WrappersMP

    def joined_by_another(executor, x, t, concat, context, *rest, **kwargs):
        context = torch.cat([context, random(1, *context.shape[1:], seed=77)])
        out = executor(torch.cat([x, x[:1]]), torch.cat([t, t[:1]]), concat, context, *rest, **kwargs)
        return out[: len(x)]

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", joined_by_another)
    spy = Spy(keys=(FIRST,))
    found = sample(comfy_host, spy.on(apply(comfy_host, other)), steps=1, **texts)
    assert {len(call["x"]) for call in spy.calls} == {3}
    assert_only_rows_that_read(spy, texts["positive"])
    assert relative_error(found, sample(comfy_host, apply(comfy_host, model), steps=1, **texts)) < 1e-4


def test_rows_that_were_added_behind_us_are_left_alone(comfy_host, model, texts, log):
    """Which of them is whose, ours cannot know any more."""
    from comfy.patcher_extension import WrappersMP

    def doubled(executor, x, t, context, y=None, control=None, options=None, **kwargs):
        out = executor(torch.cat([x, x]), torch.cat([t, t]), torch.cat([context] * 2), y, control, options, **kwargs)
        return out[: len(x)]

    patched = apply(comfy_host, model)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "probe", doubled)
    assert relative_error(sample(comfy_host, patched, **texts), sample(comfy_host, model, **texts)) < 1e-5
    assert "another node changed the number of rows on the way there" in log()[0]
