"""Which trainings are the same: whatever reaches the training loop makes another one, and nothing else does."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.host.evidence import draw
from tests.host.trainings import SMALL, Checkpoint, pictures

STYLE = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v"
TEXT_STYLE = "lora_te_text_model_encoder_layers_0_mlp_fc1"


class Enough(Exception):
    """The fingerprint is known: no step needs to be taken."""


@pytest.fixture(scope="module")
def same_as(comfy_host, pack_nodes) -> Callable[..., str]:
    """`same_as(checkpoint, rank=4)` is the fingerprint of what the node would train."""
    import sa_inject.nodes.host.learning.training as training

    original = training.training_fingerprint

    def fingerprint(checkpoint: Checkpoint, unique_id: str = "1", **inputs) -> str:
        found = []

        def stop(*args, **kwargs):
            found.append(original(*args, **kwargs))
            raise Enough

        training.training_fingerprint = stop
        try:
            with pytest.raises(Enough):
                inputs = {"images": pictures(3), **SMALL, **inputs}
                comfy_host.execute("TrainSAInjectAdapter", unique_id=unique_id, **checkpoint._asdict(), **inputs)
        finally:
            training.training_fingerprint = original
        (only,) = found
        return only

    return fingerprint


@pytest.fixture(scope="module")
def usual(sd15, same_as) -> str:
    return same_as(sd15)


@pytest.fixture(scope="module")
def lora_file(comfy_host) -> Callable[..., str]:
    """`lora_file(value)` is a LoRA for the model and the text encoder, under the same name whatever is in it."""

    def write(value: float) -> str:
        tensors = {}
        for path, n_in, n_out in ((STYLE, 320, 320), (TEXT_STYLE, 768, 3072)):
            tensors[f"{path}.lora_up.weight"] = torch.full((n_out, 2), value)
            tensors[f"{path}.lora_down.weight"] = torch.ones(2, n_in)
        save_file(tensors, comfy_host.base / "models/loras/same.safetensors")
        return "same.safetensors"

    return write


def masks(count: int = 3) -> torch.Tensor:
    """The left half, and a grey cell beside it."""
    mask = torch.zeros(count, 64, 64)
    mask[:, :, :32] = 1
    mask[:, :8, 32:40] = 0.7
    return mask


# --- nothing else counts ----------------------------------------------------------------------------------------------


def test_what_no_step_is_given_does_not_count(sd15, usual, same_as):
    others = [
        {"previews": 2},
        {"file_name": "another"},
        {"gradient_checkpointing": True},
        {"steps": 77},
        {"unique_id": "23"},
        {"precision": "fp32"},  # what "auto" is here
        {"resolution": 65},  # no other size of picture
        {"captions": ""},  # as none at all
    ]
    assert [other for other in others if same_as(sd15, **other) != usual] == []


def test_spelling_that_the_text_encoder_does_not_see_does_not_count(sd15, same_as):
    assert same_as(sd15, captions="a Photo of SAINJ  toy") == same_as(sd15, captions="a photo of sainj toy")


def test_the_same_checkpoint_loaded_again_is_the_same(usual, same_as, load_checkpoint):
    model, clip, vae = load_checkpoint("sd15")
    with torch.inference_mode():  # as uninitialised memory may be
        clip.cond_stage_model.clip_l.transformer.text_projection.weight.fill_(7.0)
    assert same_as(Checkpoint(model, clip, vae)) == usual


def test_clones_and_what_only_sampling_sees_do_not_count(sd15, usual, same_as):
    model, clip = sd15.model.clone(), sd15.clip.clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    model.set_model_attn1_output_patch(lambda out, options: out)
    model.model_options["transformer_options"]["note"] = object()
    model.set_attachments("somebody", object())
    clip.apply_hooks_to_conds = object()
    assert same_as(Checkpoint(model, clip, sd15.vae)) == usual


def test_drawing_in_between_does_not_count(sd15, usual, same_as, comfy_host):
    draw(comfy_host, sd15)
    assert same_as(sd15) == usual


def test_lora_counts_alike_whether_it_is_in_the_weights_or_applied_on_the_fly(comfy_host, sd15, lora_file, same_as):
    import comfy.model_management as model_management

    model, clip = comfy_host.execute("LoraLoader", model=sd15.model, clip=sd15.clip, lora_name=lora_file(0.01))
    styled = Checkpoint(model, clip, sd15.vae)
    expected = same_as(styled)

    from sa_inject.nodes.host.learning.fingerprint import Digest, _add_model

    def digest(on_the_fly: bool) -> str:
        model_management.unload_all_models()
        found = Digest()
        with torch.inference_mode():
            for patcher in (model, clip.patcher):
                patcher.patch_model(load_weights=False)
                patcher.load(patcher.load_device, lowvram_model_memory=1, full_load=not on_the_fly)
            assert on_the_fly == any(getattr(m, "weight_function", []) for m in model.model.modules())
            for patcher in (model, clip.patcher):
                _add_model(found, patcher, ())
                patcher.unpatch_model(patcher.offload_device)
        return found.hexdigest()

    assert digest(True) == digest(False)
    assert same_as(styled) == expected != same_as(sd15)


# --- everything that reaches the loop does ----------------------------------------------------------------------------


def test_settings_and_data_count(sd15, usual, same_as):
    others = [
        {"seed": 2},
        {"rank": 4},
        {"alpha": 4.0},
        {"batch_size": 2},
        {"gradient_accumulation": 2},
        {"token_vectors": 2},
        {"lora_learning_rate": 2e-3},
        {"token_learning_rate": 2e-3},
        {"reference_mode": "noised"},
        {"precision": "bf16"},
        {"resolution": 128},
        {"placeholder_token": "sainx"},
        {"class_word": "dog"},
        {"captions": "sainj toy"},
        {"captions": "(sainj:1.2) toy"},
        {"images": pictures(2)},
        {"images": pictures(3).flip(0)},
        {"images": pictures(3) * 0.99},
        {"masks": masks()},
        {"masks": masks() * torch.tensor([1.0, 1.0, 0.9])[:, None, None]},
    ]
    found = [same_as(sd15, **other) for other in others]
    assert usual not in found
    assert [other for other, one in zip(others, found, strict=True) if found.count(one) > 1] == []


def test_views_of_a_single_picture_count(sd15, same_as, monkeypatch):
    from sa_inject.nodes.host.learning import training_set

    found = [same_as(sd15, images=pictures(1)), same_as(sd15, images=pictures(1), seed=2)]
    monkeypatch.setattr(training_set, "VIEWS", training_set.VIEWS - 1)  # nothing else is another
    found.append(same_as(sd15, images=pictures(1)))
    assert len(set(found)) == 3


def test_clip_skip_counts(sd15, usual, same_as, comfy_host):
    (skipping,) = comfy_host.execute("CLIPSetLastLayer", clip=sd15.clip, stop_at_clip_layer=-2)
    assert same_as(sd15._replace(clip=skipping)) != usual


def test_what_a_patched_tokenizer_makes_of_a_caption_counts(sd15, usual, same_as):
    clip = sd15.clip.clone()
    clip.tokenizer = Emphatic(clip.tokenizer)
    assert same_as(sd15._replace(clip=clip)) != usual


class Emphatic:
    """A tokenizer of somebody else, under which every token weighs more."""

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__.update(vars(tokenizer), original=tokenizer)

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> dict[str, list]:
        tokens = self.original.tokenize_with_weights(text, *args, **kwargs)
        return {name: [[(t[0], 1.1, *t[2:]) for t in chunk] for chunk in of] for name, of in tokens.items()}


def test_users_embedding_in_a_caption_counts_by_value(sd15, same_as, comfy_host):
    file, caption = comfy_host.base / "models/embeddings/moody.safetensors", "sainj toy, embedding:moody"
    found = []
    for value in (0.01, 0.02):
        save_file({"clip_l": torch.full((1, 768), value)}, file)
        found.append(same_as(sd15, captions=caption))
    file.unlink()
    assert found[0] != found[1]


def test_users_lora_counts_by_value_and_strength_for_model_and_text(sd15, usual, same_as, comfy_host, lora_file):
    def styled(value: float, **strengths: float) -> str:
        inputs: dict[str, Any] = {"strength_model": 0.0, "strength_clip": 0.0, **strengths}
        model, clip = comfy_host.execute(
            "LoraLoader", model=sd15.model, clip=sd15.clip, lora_name=lora_file(value), **inputs
        )
        return same_as(Checkpoint(model, clip, sd15.vae))

    found = {
        usual,
        styled(0.01, strength_model=1.0),
        styled(0.01, strength_clip=1.0),
        styled(0.02, strength_model=1.0),
        styled(0.02, strength_clip=1.0),
        styled(0.01, strength_model=0.5),
        styled(0.01, strength_clip=0.5),
    }
    assert len(found) == 7
    assert styled(0.01, strength_model=1.0) in found  # written and loaded again


@pytest.mark.parametrize("part", ["unet", "text"])
def test_every_weight_counts(sd15, usual, same_as, part):
    module = sd15.model.model.diffusion_model if part == "unet" else sd15.clip.cond_stage_model.clip_l.transformer
    for name, weight in list(module.named_parameters())[3::29]:
        if "text_projection" in name:
            continue
        before = weight.detach().clone()
        with torch.inference_mode():
            weight.data.mul_(1.01)
        try:
            assert same_as(sd15) != usual, name
        finally:
            with torch.inference_mode():
                weight.data.copy_(before)
    assert same_as(sd15) == usual


def test_other_vae_counts_by_its_latents(sd15, usual, same_as, monkeypatch):
    encode = sd15.vae.encode
    monkeypatch.setattr(sd15.vae, "encode", lambda pixels: encode(pixels) * 1.01)
    assert same_as(sd15) != usual


def test_sampling_counts_by_what_it_computes(sd15, usual, same_as, comfy_host):
    def sampled(node: str, **inputs) -> str:
        (model,) = comfy_host.execute(node, model=sd15.model, **inputs)
        return same_as(sd15._replace(model=model))

    others = {
        sampled("ModelSamplingDiscrete", sampling="v_prediction", zsnr=False),
        sampled("ModelSamplingDiscrete", sampling="eps", zsnr=True),
        sampled("ModelSamplingDiscrete", sampling="lcm", zsnr=False),
        sampled("ModelSamplingContinuousEDM", sampling="edm", sigma_max=120.0, sigma_min=0.002),
        sampled("ModelSamplingContinuousEDM", sampling="edm", sigma_max=80.0, sigma_min=0.002),
    }
    assert len(others) == 5 and usual not in others
    assert sampled("ModelSamplingDiscrete", sampling="eps", zsnr=False) == usual  # what the model has already


def test_object_patches_and_weight_wrappers_count_by_value(sd15, usual, same_as):
    def scaled(by: float) -> Callable:
        return lambda *args, **kwargs: original(*args, **kwargs) * by

    original = sd15.model.model.diffusion_model.middle_block[0].forward
    key = "diffusion_model.middle_block.0.in_layers.2.weight"

    def patched(by: float) -> str:
        model = sd15.model.clone()
        model.add_object_patch("diffusion_model.middle_block.0.forward", scaled(by))
        return same_as(sd15._replace(model=model))

    def wrapped(by: float) -> str:
        model = sd15.model.clone()
        model.add_weight_wrapper(key, lambda weight: weight * by)
        return same_as(sd15._replace(model=model))

    assert len({usual, patched(2.0), patched(3.0), wrapped(2.0), wrapped(3.0)}) == 5
    assert patched(2.0) == patched(2.0) and wrapped(2.0) == wrapped(2.0)


def test_values_of_every_kind_are_told_apart_and_repeat(comfy_host):
    import numpy as np

    from sa_inject.nodes.host.learning.fingerprint import Digest

    class Of:
        def __init__(self, value: Any) -> None:
            self.value, self.itself = value, self  # a circle
            self.note = {object(): 1}  # of which nothing stays the same in another process

    def digest(value: Any) -> str:
        found = Digest()
        found.add(value)
        return found.hexdigest()

    def values() -> list[Any]:
        long = torch.arange(20_000.0)
        return [
            *(None, True, 1, 1.0, "1", b"1", 1j, torch.float16, [1], (1, 2), {1}, {1: 2}, {2: 1}, {"1": 2}),
            *(np.ones(3), np.zeros(3), torch.ones(2), torch.ones(1, 2), torch.ones(2, dtype=torch.complex64)),
            *(
                long,
                long + 1,
                Of(1),
                Of(2),
                Of(long),
                Of([Of(1)]),
                Of([Of(2)]),
                lambda: 1,
                lambda: 2,
                len,
                max,
                Of,
                dict,
            ),
            *(functools.partial(max, 1), functools.partial(max, 2), Of(1).__init__, [None, [None]], [[None], None]),
        ]

    digests = [digest(value) for value in values()]
    assert digests == [digest(value) for value in values()]
    twice = [value for value, one in zip(values(), digests, strict=True) if digests.count(one) > 1]
    assert twice == []


def test_injected_modules_of_other_packs_count_by_value(sd15, usual, same_as):
    from comfy.patcher_extension import PatcherInjection

    def injected(strength: float) -> str:
        def inject(patcher: Any) -> float:
            return strength

        model = sd15.model.clone()
        model.set_injections("somebody", [PatcherInjection(inject=inject, eject=inject)])
        return same_as(sd15._replace(model=model))

    assert len({usual, injected(1.0), injected(2.0)}) == 3
    assert injected(1.0) == injected(1.0)


def test_device_and_who_may_be_whose_image_prompt_count(comfy_host, pack_nodes, sd15, monkeypatch):
    import sa_inject.nodes.host.learning.training as training

    found = []

    def with_others(patcher, clip, data, *rest) -> str:
        def fingerprint(data: Any) -> str:
            return original(patcher, clip, data, *rest)

        first, second, third = data.examples
        third = dataclasses.replace(third, picture=first.picture)
        found.extend([fingerprint(data), fingerprint(dataclasses.replace(data, examples=[first, second, third]))])
        patcher.load_device = torch.device("cuda")
        found.append(fingerprint(data))
        raise Enough

    original = training.training_fingerprint
    monkeypatch.setattr(training, "training_fingerprint", with_others)
    with pytest.raises(Enough):
        comfy_host.execute("TrainSAInjectAdapter", **sd15._asdict(), images=pictures(3), **SMALL)
    assert len(set(found)) == 3


def test_versions_count(sd15, usual, same_as, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert same_as(sd15) != usual
    monkeypatch.undo()
    monkeypatch.setattr("sa_inject.nodes.host.learning.fingerprint.FORMAT", 99)
    assert same_as(sd15) != usual


def test_every_architecture_has_a_fingerprint_that_repeats(load_checkpoint, same_as):
    found = set()
    for kind in ("sd2", "sd2_v", "sdxl"):
        first, again = (same_as(Checkpoint(*load_checkpoint(kind))) for _ in range(2))
        assert first == again
        found.add(first)
    assert len(found) == 3


# --- end to end -------------------------------------------------------------------------------------------------------


def test_training_stopped_at_another_clip_skip_begins_anew(sd15, comfy_host, pack_nodes, caplog, load_checkpoint):
    import comfy.model_management as model_management

    def train(checkpoint: Checkpoint, stop: bool = False) -> int:
        calls = []

        def count(module, args):
            calls.append(args)
            if stop and len(calls) == 2:
                model_management.interrupt_current_processing(True)

        handle = checkpoint.model.model.diffusion_model.out.register_forward_pre_hook(count)
        inputs = {**checkpoint._asdict(), **SMALL, "images": pictures(3), "steps": 2}
        try:
            comfy_host.execute("TrainSAInjectAdapter", **inputs)
        except model_management.InterruptProcessingException:
            pass
        handle.remove()
        return len(calls)

    (skipping,) = comfy_host.execute("CLIPSetLastLayer", clip=sd15.clip, stop_at_clip_layer=-2)
    train(sd15, stop=True)
    with caplog.at_level(logging.INFO):
        assert train(sd15._replace(clip=skipping)) == 2
        assert not any("goes on from there" in message for message in caplog.messages)
        assert train(Checkpoint(*load_checkpoint("sd15"))) == 1
    assert any("stopped at step 1, and goes on from there" in message for message in caplog.messages)


# --- options ----------------------------------------------------------------------------------------------------------


def test_every_option_counts_where_it_is_chosen_and_nowhere_else(pack_nodes):
    from sa_inject.nodes.host.learning.fingerprint import _settings
    from sa_inject.trainer.config import TrainConfig
    from sa_inject.trainer.options import TrainOptions

    usual = _settings(TrainConfig())
    assert not {field.name for field in dataclasses.fields(TrainOptions)} & set(usual)
    others = {"optimizer": "prodigy", "schedule": "linear", "warmup_steps": 3, "horizontal_flips": True}
    others["flow_weighting"] = "cosmap"
    for field in dataclasses.fields(TrainOptions):
        value = others.get(field.name, True if isinstance(field.default, bool) else 0.5)
        found = _settings(TrainConfig(options=TrainOptions(**{field.name: value})))
        assert found.pop(field.name) == value
        found.pop("steps", None)
        assert found == usual, field.name


def test_number_of_steps_counts_where_it_changes_them(pack_nodes):
    from sa_inject.nodes.host.learning.fingerprint import _settings
    from sa_inject.trainer.config import TrainConfig
    from sa_inject.trainer.options import TrainOptions

    def differ(**options) -> bool:
        one, other = (_settings(TrainConfig(steps=steps, options=TrainOptions(**options))) for steps in (10, 20))
        return one != other

    assert differ(schedule="cosine") and differ(schedule="linear") and differ(token_freeze_after=0.5)
    assert not differ(warmup_steps=5) and not differ(prior_weight=1.0)
