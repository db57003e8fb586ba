"""Image prompts in diffusion transformers: the formula, what stays bit for bit, and that nothing is left behind."""

from typing import Any

import pytest
import torch

from tests.host.adapters import random, relative_error
from tests.host.tiny_transformers import TRANSFORMERS, tiny_transformer
from tests.host.transformer_adapters import (
    Written,
    apply,
    call,
    make_adapter,
    make_prompt,
    sample,
    text_for,
    with_text,
)

SIGMA = 0.6


@pytest.fixture(scope="module", params=TRANSFORMERS)
def model(request, comfy_host):
    return tiny_transformer(request.param)


def x_of(model: Any, batch: int = 1, size: tuple[int, int] = (12, 10)):
    return random(batch, model.model.latent_format.latent_channels, *size, seed=5)


def test_strength_zero_and_a_fresh_adapter_draw_the_bases_picture_bit_for_bit(comfy_host, model):
    plain = sample(comfy_host, model, batch=2)
    for positions in ("none", "same", "index"):
        fresh = apply(comfy_host, model, make_adapter(model, positions, is_fresh=True))
        assert torch.equal(sample(comfy_host, fresh, batch=2), plain)
    assert torch.equal(sample(comfy_host, apply(comfy_host, model, make_adapter(model), strength=0.0), batch=2), plain)
    injected = sample(comfy_host, apply(comfy_host, model, make_adapter(model)), batch=2)
    assert relative_error(injected, plain) > 1e-3
    assert torch.equal(sample(comfy_host, model, batch=2), plain)
    assert all(not module._forward_pre_hooks for module in model.model.diffusion_model.modules())


@pytest.mark.parametrize("positions", ["none", "same", "index"])
@pytest.mark.parametrize("tokens", [6, 45])
def test_the_injection_is_the_formula_for_short_and_long_prompts(comfy_host, model, positions, tokens):
    """Z-Image's picture has positions that follow the prompt's length; a reference is read with a prompt of 5."""
    adapter, prompt = make_adapter(model, positions), make_prompt(model, (8, 6))
    x, text = x_of(model, 2), text_for(model, tokens, seed=7)
    found = call(apply(comfy_host, model, adapter, prompt), x, SIGMA, text, [0])
    expected = Written(model).denoised(x, SIGMA, text, [(adapter, prompt, 1.0, None)], rows=[0, 1])
    assert relative_error(found, expected) < 1e-5
    assert relative_error(call(model, x, SIGMA, text, [0]), expected) > 1e-3


def test_only_conditional_rows_see_the_reference(comfy_host, model):
    adapter, prompt = make_adapter(model), make_prompt(model)
    x, text = x_of(model, 4), text_for(model, 9, seed=7)
    found = call(apply(comfy_host, model, adapter, prompt, strength=0.6), x, SIGMA, text, [1, 0])
    expected = Written(model).denoised(x, SIGMA, text, [(adapter, prompt, 0.6, None)], rows=[2, 3])
    assert relative_error(found, expected) < 1e-5
    both = apply(comfy_host, model, adapter, prompt, strength=0.6, apply_to="both")
    expected = Written(model).denoised(x, SIGMA, text, [(adapter, prompt, 0.6, None)], rows=[0, 1, 2, 3])
    assert relative_error(call(both, x, SIGMA, text, [1, 0]), expected) < 1e-5


def test_two_subjects_two_references_each_masks_areas_and_other_sizes(comfy_host, model):
    from sa_inject.core.masks import downsample_mask

    mask = torch.zeros(64, 48)
    mask[:40, 10:30] = 1
    area = torch.zeros(96, 80)
    area[:, :33] = 1
    one = (make_adapter(model, "index"), make_prompt(model, (8, 6), (10, 14), masks=(mask, None)))
    two = (make_adapter(model, "none", seed=50), make_prompt(model, (16, 8), (16, 8), seed=9))
    two = (two[0], with_text(two[1], [text_for(model, 3, seed=1), text_for(model, 12, seed=2)]))
    patched = apply(comfy_host, model, *one, strength=0.8, attn_mask=area)
    patched = apply(comfy_host, patched, *two, strength=0.5)
    x, text = x_of(model), text_for(model, 9, seed=7)
    patch = model.model.diffusion_model.patch_size
    weights = downsample_mask(area, 12 // patch, 10 // patch)
    given = [(*one, 0.8, weights), (*two, 0.5, None)]
    expected = Written(model).denoised(x, SIGMA, text, given, rows=[0])
    assert relative_error(call(patched, x, SIGMA, text, [0]), expected) < 1e-5


def test_cfg_above_one_and_at_one_in_a_whole_run(comfy_host, model):
    """Prompts of unlike length are calls of their own; the negative one is as without us."""
    patched = apply(comfy_host, model, make_adapter(model))
    seen: dict[str, list] = {"plain": [], "patched": []}

    def watched(target: Any, name: str) -> Any:
        from comfy.patcher_extension import WrappersMP

        def wrapper(executor, *args, **kwargs):
            out = executor(*args, **kwargs)
            options = args[5]
            seen[name].append((options["cond_or_uncond"], out))
            return out

        target = target.clone()
        target.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", wrapper)
        return target

    for cfg in (1.0, 4.0):
        sample(comfy_host, watched(model, "plain"), steps=1, cfg=cfg)
        sample(comfy_host, watched(patched, "patched"), steps=1, cfg=cfg)
    assert [kinds for kinds, _ in seen["patched"]] == [kinds for kinds, _ in seen["plain"]]
    for (kinds, plain), (_, injected) in zip(seen["plain"], seen["patched"], strict=True):
        is_negative = 0 not in kinds
        assert torch.equal(plain, injected) == is_negative


def test_bank_is_the_same_when_it_is_read_again_and_nothing_of_it_stays(comfy_host, model):
    patched = apply(comfy_host, model, make_adapter(model, "same"))
    first = sample(comfy_host, patched, steps=3)
    assert torch.equal(sample(comfy_host, patched, steps=3), first)
    assert "sa_inject_run" not in patched.model_options.get("transformer_options", {})


def test_noised_references_are_read_at_every_step(comfy_host, model):
    patched = apply(comfy_host, model, make_adapter(model, mode="noised"))
    first = sample(comfy_host, patched)
    assert first.isfinite().all() and torch.equal(sample(comfy_host, patched), first)
    assert relative_error(first, sample(comfy_host, apply(comfy_host, model, make_adapter(model)))) > 1e-4


def test_hooks_are_gone_after_an_error_and_a_cancel(comfy_host, model):
    import comfy.model_management as model_management

    def failing(executor, *args, **kwargs):
        raise failure

    from comfy.patcher_extension import WrappersMP

    patched = apply(comfy_host, model, make_adapter(model)).clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "failing", failing)
    for failure in (RuntimeError("no"), model_management.InterruptProcessingException()):
        with pytest.raises(type(failure)):
            sample(comfy_host, patched)
        network = model.model.diffusion_model
        assert all(not module._forward_pre_hooks for module in network.modules())
        assert "sa_inject_run" not in patched.model_options.get("transformer_options", {})
    assert sample(comfy_host, model).isfinite().all()


def test_choice_of_blocks_is_refused_where_there_are_none_of_that_kind(comfy_host, model):
    with pytest.raises(ValueError, match="has no decoder: its layers are all of one kind. Set blocks to 'all'"):
        apply(comfy_host, model, make_adapter(model), blocks="decoder")


def test_pictures_and_texts_of_another_model_are_refused(comfy_host, model):
    from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning

    with pytest.raises(ValueError, match="Encode it with the VAE of this base model"):
        apply(comfy_host, model, make_adapter(model), ImagePrompt((ReferenceImage(random(1, 4, 8, 8)),)))
    prompt = with_text(make_prompt(model), [TextConditioning(random(1, 7, 33))])
    with pytest.raises(ValueError, match="embedding size 33, but the model expects 64"):
        apply(comfy_host, model, make_adapter(model), prompt)


def test_blocks_that_another_pack_replaces_are_still_called(comfy_host, model):
    """They are called with ours inside, or around ours where the network has no such hook."""
    network = model.model.diffusion_model
    if not hasattr(network, "double_blocks"):
        pytest.skip("NextDiT lets no block be replaced")
    calls: list[int] = []

    def replacement(args, extra):
        calls.append(args["img"].shape[1])
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.5}

    adapter, prompt, text = make_adapter(model), make_prompt(model), text_for(model, 9, seed=7)
    replaced = model.clone()
    for name in (("double_block", 1), ("single_block", 0)):
        replaced.set_model_patch_replace(replacement, "dit", *name)
    x = x_of(model)
    theirs = call(replaced, x, SIGMA, text, [0])
    both = call(apply(comfy_host, replaced, adapter, prompt), x, SIGMA, text, [0])
    ours = call(apply(comfy_host, model, adapter, prompt), x, SIGMA, text, [0])
    assert len(calls) == 4  # twice for each: a reference is read without what others do to a drawing
    assert relative_error(both, theirs) > 1e-3 and relative_error(both, ours) > 1e-3


def test_a_compiled_model_runs_uncompiled_and_the_log_says_so(comfy_host, model, caplog):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = apply(comfy_host, model, make_adapter(model))
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    expected = sample(comfy_host, patched)
    assert "torch.compile" not in caplog.text
    assert relative_error(sample(comfy_host, compiled), expected) < 1e-4
    assert caplog.text.count("It runs uncompiled") == 1


def test_blocks_that_are_compiled_one_by_one_run_uncompiled_and_the_log_says_so(comfy_host, model, caplog):
    """As nodes of other packs compile them: here the last block of each kind."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    network = model.model.diffusion_model
    stages = [stage for stage in ("layers", "double_blocks", "single_blocks") if hasattr(network, stage)]
    keys = [f"diffusion_model.{stage}.{len(getattr(network, stage)) - 1}" for stage in stages]
    adapter, prompt, text, x = make_adapter(model), make_prompt(model), text_for(model, 9, seed=7), x_of(model)
    expected = call(apply(comfy_host, model, adapter, prompt), x, SIGMA, text, [0])
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=keys)
    found = call(apply(comfy_host, compiled, adapter, prompt), x, SIGMA, text, [0])
    assert relative_error(found, expected) < 1e-5
    assert caplog.text.count("It runs uncompiled") == 1


def counted_patches(calls: list[str]) -> dict[str, Any]:
    """What another pack may put around or into the blocks, each of which changes the picture."""

    def of_block(kind: str) -> Any:
        def patch(args):
            calls.append(kind)
            return {**args, "img": args["img"] * 0.9}

        return patch

    def before_attention(q, k, v, **more):
        calls.append("attn1_patch")
        return {"q": q * 0.9, "k": k, "v": v}

    def after_attention(out, extra):
        calls.append("attn1_output_patch")
        return out * 0.9

    kinds = ("double_block", "single_block", "noise_refiner", "post_input")
    patches = {kind: of_block(kind) for kind in kinds}
    return {**patches, "attn1_patch": before_attention, "attn1_output_patch": after_attention}


def test_patches_and_wrappers_of_other_packs_are_called_as_often_as_without_ours(comfy_host, model):
    """Which of them a network calls at all depends on ComfyUI's version; a wrapper always is."""
    from comfy.patcher_extension import WrappersMP

    calls: list[str] = []
    adapter, prompt, text, x = make_adapter(model), make_prompt(model), text_for(model, 9, seed=7), x_of(model)
    ours = call(apply(comfy_host, model, adapter, prompt), x, SIGMA, text, [0])
    for kind, patch in {**counted_patches(calls), "wrapper": None}.items():
        changed = model.clone()
        if patch is None:

            def wrapper(executor, *args, **kwargs):
                calls.append("wrapper")
                return executor(*args, **kwargs) * 0.9

            changed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "theirs", wrapper)
        else:
            changed.set_model_patch(patch, kind)
        calls.clear()
        theirs = call(changed, x, SIGMA, text, [0])
        expected = list(calls)
        if not expected:
            continue  # this ComfyUI has no such patch for this network
        calls.clear()
        both = call(apply(comfy_host, changed, adapter, prompt), x, SIGMA, text, [0])
        assert calls == expected, kind
        assert relative_error(both, theirs) > 1e-3 and relative_error(both, ours) > 1e-3, kind
    assert expected == ["wrapper"]
