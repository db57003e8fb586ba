"""The Apply node leaves no trace: not in the model it was given, not in the next run, not after an error."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
    random,
    reference_text,
    relative_error,
    sample,
)
from tests.host.in_process import defaults
from tests.host.tiny_checkpoints import KINDS


@pytest.mark.parametrize(
    "widgets",
    [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"start_percent": 0.7, "end_percent": 0.2}],
    ids=["strength 0", "start is end", "start after end"],
)
def test_nothing_to_inject_gives_the_base_models_image(comfy_host, model, widgets):
    patched = apply(comfy_host, model, **widgets)
    assert not any("sa_inject" in wrappers for wrappers in patched.wrappers.values())
    assert patched.patches_uuid == model.patches_uuid  # the host does not load it anew
    assert torch.equal(sample(comfy_host, patched), sample(comfy_host, model))


def test_previews_are_drawn_as_apply_draws_by_itself(comfy_host, pack_nodes, model):
    from sa_inject.nodes.host.drawing.injection import build_injection
    from sa_inject.nodes.host.drawing.preview import default_injection

    adapter, prompt = make_adapter(model), make_prompt()
    widgets = defaults(pack_nodes["ApplySelfAttnInjection"].INPUT_TYPES())
    assert vars(default_injection(adapter, prompt)) == vars(
        build_injection(model, adapter, prompt, attn_mask=None, **widgets)
    )


@pytest.mark.parametrize("kind, mode", [*((kind, "clean") for kind in KINDS), ("sd15", "noised")])
def test_a_run_without_apply_is_as_if_there_had_been_none(comfy_host, kind, mode):
    model = base_model(comfy_host, kind)
    before = sample(comfy_host, model)
    injected = sample(comfy_host, apply(comfy_host, model, make_adapter(model, mode)))
    assert injected.isfinite().all()
    assert relative_error(injected, before) > 1e-3
    assert torch.equal(sample(comfy_host, model), before)


def test_no_weight_changes_by_one_bit(comfy_host, model):
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    sample(comfy_host, apply(comfy_host, model))
    after = model.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def snapshot(value: Any) -> Any:
    """Containers by value, everything else by identity."""
    if isinstance(value, dict):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [snapshot(entry) for entry in value]
    return id(value)


def test_the_model_that_was_connected_stays_as_it_was(comfy_host, model):
    """Also when it has patches of others and wrappers of ours already, and after sampling with the result."""
    other = Spy().on(model)
    other.set_model_attn1_patch(lambda q, k, v, options: (q, k, v))
    other.set_model_attn1_replace(lambda q, k, v, options: v, "middle", 0, 0)
    for given in (other, apply(comfy_host, other)):
        before = snapshot(given.model_options), snapshot(given.wrappers), snapshot(vars(given)), set(vars(given.model))
        kept = dict(given.wrappers), vars(given).copy()  # so that no id is given to another object
        patched = apply(comfy_host, given)
        sample(comfy_host, patched)
        after = snapshot(given.model_options), snapshot(given.wrappers), snapshot(vars(given)), set(vars(given.model))
        assert after[:2] == before[:2]
        changed = {name for name in after[2] if after[2][name] != before[2].get(name)}
        assert changed <= {"size", "hook_mode", "skip_injection"}, kept
        assert after[3] == before[3]
        assert patched is not given and patched.model is given.model


def test_same_seed_same_image_cold_warm_and_on_the_tenth_run(comfy_host):
    model = comfy_host.load_checkpoint("sd15")[0]
    adapter, prompt = make_adapter(model, "noised"), make_prompt((8, 16))
    patched = apply(comfy_host, model, adapter, prompt)
    cold = sample(comfy_host, patched)
    assert torch.equal(sample(comfy_host, patched), cold)
    others = [apply(comfy_host, model, make_adapter(model, seed=50)), model, patched]
    for run in range(3, 10):
        sample(comfy_host, others[run % 3], seed=run, steps=1, size=(8, 16) if run % 2 else (8, 8))
    assert torch.equal(sample(comfy_host, patched), cold)
    again = apply(comfy_host, model, make_adapter(model, "noised"), make_prompt((8, 16)))
    assert torch.equal(sample(comfy_host, again), cold)
    fresh = comfy_host.load_checkpoint("sd15")[0]
    assert torch.equal(sample(comfy_host, apply(comfy_host, fresh, adapter, prompt)), cold)


def test_another_seed_another_noise_on_the_pictures(comfy_host, model):
    """In noised mode the seed of the sampler also noises the pictures, so nothing else may decide on it."""
    patched = apply(comfy_host, model, make_adapter(model, "noised"))
    torch.manual_seed(0)
    first = sample(comfy_host, patched)
    torch.manual_seed(1)
    assert torch.equal(sample(comfy_host, patched), first)
    assert not torch.equal(sample(comfy_host, patched, seed=2), first)


def test_injection_draws_no_number_from_torchs_own_generator(comfy_host, model):
    """An ancestral sampler draws from it at every step, and must draw the same numbers with and without us."""
    states = []
    for patched in (model, apply(comfy_host, model, make_adapter(model, "noised"))):
        torch.manual_seed(5)
        sample(comfy_host, patched)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def denoised_steps(model, steps: int = 4) -> list[Tensor]:
    """What the sampler believes the picture to be at every step."""
    import comfy.sample

    found: list[Tensor] = []
    positive, negative = conditioning(model, 11), conditioning(model, 22)
    with torch.inference_mode():
        comfy.sample.sample(
            model,
            random(1, 4, 8, 8),
            steps,
            4.0,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros(1, 4, 8, 8),
            callback=lambda step, denoised, x, total: found.append(denoised.clone()),
            disable_pbar=True,
            seed=1,
        )
    return found


def test_steps_outside_of_the_range_are_those_of_the_base_model(comfy_host, model):
    """Until the start they are the base model's bit for bit; until the end those of an injection without end."""
    plain, whole = denoised_steps(model), denoised_steps(apply(comfy_host, model))
    late = denoised_steps(apply(comfy_host, model, start_percent=0.4))
    early = denoised_steps(apply(comfy_host, model, end_percent=0.4))
    assert [torch.equal(a, b) for a, b in zip(late, plain, strict=True)] == [True, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(early, whole, strict=True)] == [True, True, False, False]
    assert not any(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


@pytest.mark.parametrize(
    "start, end, injected", [(0.0, 1.0, 4), (0.0, 0.4, 2), (0.4, 1.0, 2), (0.2, 0.6, 2), (0.8, 1.0, 0)]
)
def test_steps_outside_of_the_range_call_the_plain_unet(comfy_host, model, start, end, injected):
    """Four steps of the simple schedule stand at 0, 1/4, 2/4 and 3/4."""
    spy = Spy(keys=(FIRST,))
    denoised_steps(spy.on(apply(comfy_host, model, start_percent=start, end_percent=end)))
    assert len(spy.calls) == 4
    assert [a.injected_rows() != [] for a in spy.attended] == [True] * injected
    inside = [place for place in range(4) if start <= place / 4 <= end]
    assert [a.sigma for a in spy.attended] == [float(spy.calls[place]["options"]["sigmas"]) for place in inside]


def through_free_u(host, model):
    return host.execute("FreeU_V2", model=model)[0]


def through_model_sampling(host, model):
    return host.execute("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]


def through_rescale_cfg(host, model):
    return host.execute("RescaleCFG", model=model, multiplier=0.7)[0]


@pytest.mark.parametrize("node", [through_free_u, through_model_sampling, through_rescale_cfg])
def test_injection_survives_the_copies_of_nodes_downstream(comfy_host, model, node: Callable):
    """Every node copies the model's options deeply; before us or after us is one picture."""
    adapter, prompt = make_adapter(model, "noised"), make_prompt()
    downstream = sample(comfy_host, node(comfy_host, node(comfy_host, apply(comfy_host, model, adapter, prompt))))
    upstream = sample(comfy_host, apply(comfy_host, node(comfy_host, node(comfy_host, model)), adapter, prompt))
    assert torch.equal(downstream, upstream)
    assert relative_error(downstream, sample(comfy_host, node(comfy_host, model))) > 1e-3


def test_range_follows_a_model_sampling_node_downstream(comfy_host, model):
    """Percents are of the schedule that is sampled, as ComfyUI's own are; before us or after us is one picture."""
    adapter, prompt = make_adapter(model), make_prompt()
    spies = Spy(keys=(FIRST,)), Spy(keys=(FIRST,))
    downstream = through_model_sampling(comfy_host, apply(comfy_host, model, adapter, prompt, start_percent=0.5))
    upstream = apply(comfy_host, through_model_sampling(comfy_host, model), adapter, prompt, start_percent=0.5)
    for spy, patched in zip(spies, (downstream, upstream), strict=True):
        denoised_steps(spy.on(patched))
    assert [a.sigma for a in spies[0].attended] == [a.sigma for a in spies[1].attended]


class Witness(Spy):
    """Remembers the run and the bank of a sampling weakly, and may fail at its second call."""

    def __init__(self, at_second_call: Callable[[], None] = lambda: None):
        super().__init__(keys=())
        self.at_second_call = at_second_call
        self.run = self.tensor = None
        self.count = 0

    def __call__(self, executor, *args, **kwargs):
        from sa_inject.nodes.host.drawing.patch import RUN_KEY  # pyright: ignore[reportMissingImports]

        run = args[5][RUN_KEY]
        (bank,) = run.banks.values()
        self.run, self.tensor = weakref.ref(run), weakref.ref(bank[FIRST].k)
        self.count += 1
        if self.count == 2:
            self.at_second_call()
        return executor(*args, **kwargs)

    def assert_all_is_gone(self, *models) -> None:
        from sa_inject.nodes.host.drawing.patch import RUN_KEY  # pyright: ignore[reportMissingImports]

        gc.collect()
        assert self.run is not None and self.run() is None
        assert self.tensor is not None and self.tensor() is None
        for model in models:
            assert RUN_KEY not in model.model_options.get("transformer_options", {})


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_run_and_bank_are_released_when_the_run_ends(comfy_host, model, mode):
    """And while it lasts there is one bank, not one a step."""
    witness = Witness()
    patched = witness.on(apply(comfy_host, model, make_adapter(model, mode)))
    sample(comfy_host, patched)
    assert witness.count == 2
    witness.assert_all_is_gone(patched, model)


def test_run_and_bank_are_released_after_an_error(comfy_host, model):
    def fail():
        raise RuntimeError("no such luck")

    assert_released_after(comfy_host, model, fail, RuntimeError)


def test_run_and_bank_are_released_after_cancel(comfy_host, model):
    import comfy.model_management as management

    def cancel():
        management.interrupt_current_processing(True)

    assert_released_after(comfy_host, model, cancel, management.InterruptProcessingException)


def assert_released_after(host, model, event: Callable[[], None], error: type[BaseException]) -> None:
    """And the same models sample as before."""
    plain = sample(host, model)
    applied = apply(host, model)
    expected = sample(host, applied)
    witness = Witness(event)
    patched = witness.on(applied)
    with pytest.raises(error):
        sample(host, patched)
    witness.assert_all_is_gone(patched, applied, model)
    assert torch.equal(sample(host, model), plain)
    assert torch.equal(sample(host, applied), expected)


def test_a_reference_pass_that_fails_leaves_nothing(comfy_host, model):
    """A subject phrase of another width than the model reads: the error comes out of the middle of the UNet."""
    from sa_inject.core.image_prompt import TextConditioning  # pyright: ignore[reportMissingImports]

    plain = sample(comfy_host, model)
    adapter = make_adapter(model)
    adapter.class_conditioning = TextConditioning(random(1, 7, 33))
    patched = apply(comfy_host, model, adapter=adapter)
    with pytest.raises(RuntimeError):
        sample(comfy_host, patched)
    assert torch.equal(sample(comfy_host, model), plain)


def test_text_of_another_model_is_refused_by_the_picture(comfy_host, model):
    from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning  # pyright: ignore[reportMissingImports]

    picture = ReferenceImage(random(1, 4, 8, 8), text=TextConditioning(random(1, 7, 33)))
    with pytest.raises(
        ValueError, match="conditioning of picture 1 of the image prompt has embedding size 33,.* expects 768"
    ):
        apply(comfy_host, model, prompt=ImagePrompt((picture,)))


def test_a_call_outside_of_a_sampling_run_is_injected_and_keeps_nothing(comfy_host, model):
    patched = load(apply(comfy_host, model))
    x, text = random(1, 4, 8, 8), reference_text(model, 5).cross_attn
    before = snapshot(patched.model_options), snapshot(patched.wrappers)
    found = call_unet(patched, x, 1.0, text, None)
    assert relative_error(found, call_unet(model, x, 1.0, text, None)) > 1e-3
    assert (snapshot(patched.model_options), snapshot(patched.wrappers)) == before


def test_what_other_packs_handed_over_is_not_written_to(comfy_host, model):
    """Their dictionaries may live longer than one call."""
    patched = load(apply(comfy_host, model))
    replaced = {"attn1": {("middle", 0): lambda q, k, v, options: v}, "attn2": {}}
    before = snapshot(replaced)
    call_unet(patched, random(1, 4, 8, 8), 1.0, reference_text(model, 5).cross_attn, [0], patches_replace=replaced)
    assert snapshot(replaced) == before


def test_more_memory_is_asked_for_as_the_pictures_need_it(comfy_host, model, monkeypatch):
    """Pictures count as further rows of the batch that is drawn."""
    import comfy.sampler_helpers

    asked: list[list[int]] = []
    estimate = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(
        comfy.sampler_helpers,
        "estimate_memory",
        lambda model, shape, conds: asked.append(list(shape)) or estimate(model, shape, conds),
    )
    sample(comfy_host, apply(comfy_host, model, prompt=make_prompt((8, 8), (8, 16), (8, 8))), batch=2)
    assert asked == [[2 + 4, 4, 8, 8]]


@pytest.mark.parametrize("blocks, stages", [("encoder", {"input"}), ("decoder", {"output"}), ("middle", {"middle"})])
def test_only_the_chosen_blocks_are_injected(comfy_host, model, blocks, stages):
    spy = Spy()
    sample(comfy_host, spy.on(apply(comfy_host, model, blocks=blocks)), cfg=1.0)
    assert {a.key.stage for a in spy.attended} == stages
    assert all(a.injected_rows() == [0] for a in spy.attended)
