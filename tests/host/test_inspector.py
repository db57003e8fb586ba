"""Inspect Self-Attention Injection shows what happens and changes nothing of it."""

import pytest
import torch

from tests.host.adapters import apply, base_model, conditioning, make_adapter, make_prompt, sample

SIZE = (8, 8)
POINT = (0.3, 0.8)
SAMPLING = {"seed": 1, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture(scope="module")
def model(comfy_host):
    return base_model(comfy_host, "sd15")


@pytest.fixture
def inspect(comfy_host, pack_nodes, model):
    """`inspect(patched)`: what was seen in a run on the patched model."""
    from sa_inject.nodes.host.drawing.inspection import inspect_sampling

    def run(patched, point=POINT, **sampling):
        latent = {"samples": torch.zeros(1, 4, *SIZE)}
        texts = conditioning(model, 11), conditioning(model, 22)
        with torch.inference_mode():
            return inspect_sampling(patched, *texts, latent, point, **(SAMPLING | sampling))

    return run


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_looking_changes_nothing_of_what_is_drawn(comfy_host, model, inspect, mode):
    patched = apply(comfy_host, model, make_adapter(model, mode))
    drawn = sample(comfy_host, patched, **SAMPLING)
    seen = inspect(patched).latent
    # Watched, the pictures of a noised reference are read in a call of their own, which rounds otherwise.
    assert torch.equal(seen, drawn) if mode == "clean" else torch.allclose(seen, drawn, rtol=1e-4, atol=1e-3)
    assert torch.equal(sample(comfy_host, patched, **SAMPLING), drawn)


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_every_part_and_every_acting_step_is_seen(comfy_host, model, inspect, mode):
    found = inspect(apply(comfy_host, model, make_adapter(model, mode)))
    assert len(found.levels) == SAMPLING["steps"]
    assert list(found.levels) == sorted(found.levels, reverse=True)
    layers = [layer.key.stage for layer in make_adapter(model).info.layers]
    for maps in found.levels.values():
        assert maps.layers == {stage: layers.count(stage) for stage in dict.fromkeys(layers)}
        assert all((maps.mean(stage) > 0).all() and maps.mean(stage).shape == SIZE for stage in maps.layers)


def test_steps_in_which_nothing_acts_are_not_shown(comfy_host, model, inspect):
    found = inspect(apply(comfy_host, model, start_percent=0.5))
    assert 0 < len(found.levels) < SAMPLING["steps"]


def test_twice_the_strength_is_twice_as_much_in_the_first_step(comfy_host, model, inspect):
    once, twice = (
        next(iter(inspect(apply(comfy_host, model, strength=s, blocks="encoder")).levels.values())).added["input"]
        for s in (0.01, 0.02)
    )
    assert torch.allclose(twice, 2 * once, rtol=0.02)


def test_nothing_is_added_where_the_mask_is_black(comfy_host, model, inspect):
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    found = inspect(apply(comfy_host, model, attn_mask=mask))
    for maps in found.levels.values():
        for stage in maps.layers:
            assert float(maps.mean(stage)[:, :3].max()) < 1e-6 < float(maps.mean(stage)[:, 5:].min())


def test_the_chosen_place_looks_inside_the_masks_of_the_references(comfy_host, model, inspect):
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    prompt = make_prompt((8, 8), (8, 8), masks=(mask, None))
    found = inspect(apply(comfy_host, model, prompt=prompt))
    first, second = found.attention_maps
    assert float(first.sum() + second.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(first[6:].sum()) < 0.05 * float(first.sum())
    assert float(second.min()) > 0


def test_the_place_that_is_chosen_matters(comfy_host, model, inspect):
    patched = apply(comfy_host, model)
    one, other = (inspect(patched, point).attention_maps[0] for point in ((0.05, 0.05), (0.95, 0.95)))
    assert not torch.allclose(one, other)


def test_two_subjects_are_told_apart(comfy_host, model, inspect):
    left, right = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    left[..., :32], right[..., 32:] = 1, 1
    patched = apply(comfy_host, model, make_adapter(model, seed=1), make_prompt(seed=1), attn_mask=left)
    patched = apply(comfy_host, patched, make_adapter(model, seed=2), make_prompt(seed=2), attn_mask=right)
    found = inspect(patched)
    assert len(found.injections) == 2 and len(found.attention_maps) == 2
    assert all(float(seen.sum()) > 0 for seen in found.attention_maps)


def test_an_attention_of_another_pack_is_still_called(comfy_host, model, inspect):
    patched, calls = apply(comfy_host, model), []

    def other(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs)

    patched.model_options["transformer_options"]["optimized_attention_override"] = other
    assert inspect(patched).levels and calls


def test_a_model_without_injection_is_refused(model, inspect):
    with pytest.raises(ValueError, match="Apply Self-Attention Injection"):
        inspect(model)


def test_a_run_in_which_no_reference_acts_is_told(comfy_host, model, inspect):
    with pytest.raises(ValueError, match="start_percent"):
        inspect(apply(comfy_host, model, start_percent=0.98, end_percent=0.99), steps=1)


def test_the_node_gives_two_pictures(comfy_host, model, load_checkpoint):
    vae = load_checkpoint("sd15")[2]
    added, looked_at = comfy_host.execute(
        "InspectSelfAttnInjection",
        model=apply(comfy_host, model, prompt=make_prompt((8, 8), (8, 16))),
        positive=conditioning(model, 11),
        negative=conditioning(model, 22),
        latent_image={"samples": torch.zeros(1, 4, *SIZE)},
        vae=vae,
        noise_levels=2,
        point_x=0.5,
        point_y=0.5,
        **SAMPLING,
    )
    for picture in (added, looked_at):
        assert picture.ndim == 4 and picture.shape[-1] == 3 and 0 <= picture.min() and picture.max() <= 1
        assert picture.std() > 0.05
    assert added.shape[2] == 2 * 392 + 8 and looked_at.shape[2] == 3 * 392 + 8
