"""LoRA hooks of a conditioning change the weights from one call to the next: each reads the reference under its own."""

import pytest

from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    conditioning,
    make_adapter,
    random,
    relative_error,
    sample,
)
from tests.host.test_rows import assert_only_rows_that_read, combined, count_unet_rows

MODES = ["clean", "noised"]


def lora(model, seed: int) -> dict:
    """A user's LoRA on what the self-attentions read and hand over."""
    tensors = {}
    for block in ("input_blocks.1.1", "middle_block.1"):
        for name in ("attn1.to_k", "attn2.to_v", "ff.net.2"):
            path = f"{block}.transformer_blocks.0.{name}"
            out, inner = model.model.diffusion_model.get_submodule(path).weight.shape
            tensors[f"diffusion_model.{path}.lora_up.weight"] = random(out, 2, seed=seed) * 0.3
            tensors[f"diffusion_model.{path}.lora_down.weight"] = random(2, inner, seed=seed + 1) * 0.3
    return tensors


@pytest.fixture
def hooked(comfy_host, model):
    """`hooked(seed, text, strengths)`: a conditioning with LoRA hooks, of these strengths over the steps."""
    import comfy.hooks

    def make(seed: int, text: list, strengths: tuple[float, ...] = ()) -> list:
        hooks = comfy.hooks.create_hook_lora(lora(model, seed), 1.0, 0.0)
        frames = None
        for place, strength in enumerate(strengths):
            (frames,) = comfy_host.execute(
                "CreateHookKeyframe",
                strength_mult=strength,
                start_percent=place / len(strengths),
                **({} if frames is None else {"prev_hook_kf": frames}),
            )
        if frames is not None:
            (hooks,) = comfy_host.execute("SetHookKeyframes", hooks=hooks, hook_kf=frames)
        return comfy_host.execute(
            "ConditioningSetProperties", cond_NEW=text, strength=1.0, set_cond_area="default", hooks=hooks
        )[0]

    return make


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_hooked_prompts_changes_nothing(comfy_host, model, hooked, mode):
    """As without ours. Both are combined, so their average is drawn whichever comes first."""
    pair = [hooked(seed, conditioning(model, text)) for seed, text in ((50, 11), (60, 33))]
    patched = apply(comfy_host, model, make_adapter(model, mode))
    orders = [combined(comfy_host, *pair), combined(comfy_host, *pair[::-1])]
    found = [sample(comfy_host, patched, positive=positive) for positive in orders]
    assert relative_error(*found) < 1e-5
    assert relative_error(found[0], sample(comfy_host, model, positive=orders[0])) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_a_hooked_prompt_reads_what_the_lora_makes_of_the_reference(comfy_host, model, hooked, mode):
    """Drawn together with another, each row is injected with what it is injected with alone."""
    first, second = hooked(50, conditioning(model, 11)), conditioning(model, 33)
    patched = apply(comfy_host, model, make_adapter(model, mode))

    def attended(positive):
        spy = Spy(keys=(FIRST,))
        sample(comfy_host, spy.on(patched), positive=positive, steps=1, cfg=1.0)
        assert_only_rows_that_read(spy, first, second)
        return {text: a.out for a in spy.attended for text in range(2) if a.rows_that_read((first, second)[text])}

    together, alone = attended(combined(comfy_host, first, second)), {**attended(first), **attended(second)}
    assert together.keys() == alone.keys() == {0, 1}
    for text in together:
        assert relative_error(together[text], alone[text]) < 1e-5


@pytest.mark.parametrize("mode, passes", [("clean", 2), ("noised", 4)])
def test_a_schedule_of_strengths_is_read_at_each_of_them(comfy_host, model, hooked, mode, passes):
    """Two strengths over four steps: a clean reference is read for each strength, a noised one at every step."""
    from sa_inject.nodes.host.drawing.patch import RUN_KEY  # pyright: ignore[reportMissingImports]

    positive = hooked(50, conditioning(model, 11), strengths=(1.0, 0.2))
    spy = Spy(keys=())
    patched = spy.on(apply(comfy_host, model, make_adapter(model, mode)))

    def draw():
        return sample(comfy_host, patched, positive=positive, steps=4, cfg=1.0, scheduler="simple")

    calls = count_unet_rows(model, draw)
    run = spy.calls[0]["options"][RUN_KEY]
    banks = list(run.banks)
    assert len(calls.rows) == 4 + passes
    assert len(banks) == 1  # the others have been let go
    assert banks[0].strengths == (0.2,)


def test_a_schedule_is_drawn_as_its_parts_are(comfy_host, model, hooked):
    """Strength 1 at first and 0.2 later: the last call is injected as in a run with 0.2 throughout."""
    text = conditioning(model, 11)
    patched = apply(comfy_host, model, make_adapter(model))

    def last_bank(strengths):
        from sa_inject.nodes.host.drawing.patch import RUN_KEY  # pyright: ignore[reportMissingImports]

        spy = Spy(keys=())
        positive = hooked(50, text, strengths=strengths)
        sample(comfy_host, spy.on(patched), positive=positive, steps=4, cfg=1.0, scheduler="simple")
        (bank,) = spy.calls[-1]["options"][RUN_KEY].banks.values()
        return bank

    changed, throughout, strong = last_bank((1.0, 0.2)), last_bank((0.2, 0.2)), last_bank((1.0, 1.0))
    for key in throughout:
        assert relative_error(changed[key].k, throughout[key].k) < 1e-5
    assert relative_error(changed[key].k, strong[key].k) > 1e-3
