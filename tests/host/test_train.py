"""Training on the host's own models: what is learned, what is left alone, and what the user sees meanwhile."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from tests.host.evidence import (
    Evidence,
    assert_unchanged,
    draw,
    modules_of,
    patches_of,
    same_bytes,
    weights_of,
)
from tests.host.trainings import SMALL, Checkpoint, pictures, tensors_of

STEPS = 4  # the last to move is lora_A of the keys, from the third step on
LEARNING_STEPS = {"sd15": 8, "sd15_inpaint": 2, "sd2": 2, "sd2_v": 4, "sdxl": 6}


class Trained(NamedTuple):
    adapter: Any
    clip: Any
    losses: list[float]
    previews: torch.Tensor
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(comfy_host, pack_nodes) -> Callable[..., Trained]:
    """`run(checkpoint, images=..., steps=...)` trains through the node, with few and small steps."""

    def train(checkpoint: Checkpoint, **inputs) -> Trained:
        inputs = {"images": pictures(3), **SMALL, **inputs}
        adapter, clip, loss_map, previews, _ = comfy_host.execute(
            "TrainSAInjectAdapter", **checkpoint._asdict(), **inputs
        )
        (path,) = (comfy_host.base / "models/sa_inject").rglob(f"{adapter.name}.safetensors")
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        return Trained(adapter, clip, loss_map["loss"], previews, metadata, tensors)

    return train


@pytest.fixture(scope="module")
def evidence(comfy_host) -> Callable[[Checkpoint], Evidence]:
    def collect(checkpoint: Checkpoint) -> Evidence:
        patches = patches_of(checkpoint)  # first: drawing loads the model, which would tidy it up
        return Evidence(weights_of(checkpoint), patches, draw(comfy_host, checkpoint))

    return collect


@pytest.fixture(scope="module")
def before(comfy_host, sd15, evidence) -> Evidence:
    """How the checkpoint was when it had drawn a picture and trained nothing."""
    draw(comfy_host, sd15)
    return evidence(sd15)


@pytest.fixture(scope="module")
def trained(sd15, before, run) -> Trained:
    return run(sd15, steps=STEPS)


# --- nothing else changes ---------------------------------------------------------------------------------------------


def test_success_leaves_model_clip_and_vae_as_they_were(sd15, before, run, evidence):
    run(sd15, gradient_checkpointing=True)
    assert_unchanged(evidence(sd15), before)


def test_training_computes_with_the_loaded_weights_and_not_with_copies(sd15, before, run):
    if sd15.model.load_device.type != "cpu":
        pytest.skip("elsewhere loading itself moves the weights")

    def addresses() -> dict[str, int]:
        return {
            f"{part} {name}": weight.data_ptr()
            for part, module in modules_of(sd15).items()
            for name, weight in module.named_parameters()
        }

    loaded, seen = addresses(), []
    output = sd15.model.model.diffusion_model.out
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(addresses()))
    run(sd15)
    handle.remove()
    assert seen == [loaded] and addresses() == loaded


class OutOfLuck(Exception):
    pass


@pytest.mark.parametrize(
    "where, precision", [("vae", "bf16"), ("unet", "auto"), ("backward", "bf16"), ("progress", "auto")]
)
def test_an_error_leaves_model_clip_and_vae_as_they_were(sd15, before, run, evidence, monkeypatch, where, precision):
    calls = []

    def raise_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OutOfLuck

    def unlucky(function):
        def call(*args, **kwargs):
            raise_the_second_time()
            return function(*args, **kwargs)

        return call

    handle = None
    if where == "vae":
        monkeypatch.setattr(sd15.vae, "encode", unlucky(sd15.vae.encode))
    elif where == "progress":
        from sa_inject.nodes.host.training_progress import TrainingProgress

        monkeypatch.setattr(TrainingProgress, "update", unlucky(TrainingProgress.update))
    else:
        output = sd15.model.model.diffusion_model.out
        hook = output.register_full_backward_hook if where == "backward" else output.register_forward_pre_hook
        handle = hook(raise_the_second_time)
    with pytest.raises(OutOfLuck):
        run(sd15, steps=9, precision=precision, gradient_checkpointing=True)
    monkeypatch.undo()
    if handle is not None:
        handle.remove()
    assert_unchanged(evidence(sd15), before)


def test_cancel_stops_within_the_step_and_leaves_everything_as_it_was(
    sd15, before, run, evidence, comfy_host, shown_texts
):
    import comfy.model_management as model_management

    calls = []

    def cancel_in_the_second_step(module, args):
        calls.append(args)
        if len(calls) == 2:
            model_management.interrupt_current_processing(True)

    adapters = set((comfy_host.base / "models/sa_inject").rglob("*.safetensors"))
    handle = sd15.model.model.diffusion_model.out.register_forward_pre_hook(cancel_in_the_second_step)
    with pytest.raises(model_management.InterruptProcessingException):
        run(sd15, steps=50, precision="bf16", gradient_checkpointing=True)
    handle.remove()
    assert len(calls) == 2
    _, *steps = shown_texts  # what is known before the first step comes first
    assert [text.split(",")[0] for text in steps] == ["step 1/50"]
    assert not model_management.processing_interrupted()
    assert set((comfy_host.base / "models/sa_inject").rglob("*.safetensors")) == adapters
    assert_unchanged(evidence(sd15), before)


# --- a training that is stopped ---------------------------------------------------------------------------------------


@pytest.fixture
def kept(comfy_host) -> Callable[[], list[Path]]:
    """What is kept of trainings."""
    folder = comfy_host.base / "models/sa_inject/training_states"
    return lambda: sorted(folder.glob("*"))


@pytest.fixture
def stop(sd15, run) -> Callable[..., None]:
    """`stop(after, ...)` trains, and cancels in the step after so many."""
    import comfy.model_management as model_management

    def train_and_cancel(after: int, **inputs) -> None:
        calls = []

        def cancel(module, args):
            calls.append(args)
            if len(calls) == after + 1:
                model_management.interrupt_current_processing(True)

        handle = sd15.model.model.diffusion_model.out.register_forward_pre_hook(cancel)
        with pytest.raises(model_management.InterruptProcessingException):
            run(sd15, **inputs)
        handle.remove()

    return train_and_cancel


def steps_run(sd15, run, **inputs) -> tuple[Trained, int]:
    calls = []
    handle = sd15.model.model.diffusion_model.out.register_forward_pre_hook(lambda module, args: calls.append(args))
    found = run(sd15, **inputs)
    handle.remove()
    return found, len(calls)


def test_cancelled_training_goes_on_when_it_is_queued_again(sd15, trained, run, stop, kept, caplog, shown_texts):
    stop(1, steps=STEPS)
    stop(1, steps=STEPS)
    assert len(kept()) == 1
    shown_texts.clear()
    with caplog.at_level(logging.INFO):
        found, taken = steps_run(sd15, run, steps=STEPS, file_name="another name")
    assert taken == STEPS - 2
    assert shown_texts[1].startswith(f"step 3/{STEPS}")
    assert any("stopped at step 2, and goes on from there" in message for message in caplog.messages)
    assert found.losses == trained.losses
    assert all(same_bytes(found.tensors[key], tensor) for key, tensor in trained.tensors.items())
    assert [file.stem.split("-")[1:] for file in kept()] == [[f"{STEPS:06}", "finished"]]


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"rank": 4}, {"captions": "sainj"}, {"images": pictures(2)}, {"token_learning_rate": 2e-3}],
    ids=lambda other: next(iter(other)),
)
def test_another_training_begins_anew_and_leaves_what_was_kept(sd15, run, stop, kept, other):
    stop(1, steps=2)
    (before,) = kept()
    _, taken = steps_run(sd15, run, steps=2, **other)
    assert taken == 2
    assert before in kept() and len(kept()) == 2


def test_stopped_training_may_be_lengthened_but_not_cut_short(sd15, trained, run, stop, kept, caplog):
    stop(2, steps=3)
    with caplog.at_level(logging.INFO):
        short, taken = steps_run(sd15, run, steps=1)
    assert taken == 1 and short.losses == trained.losses[:1]
    assert any("stopped at step 2, and 1 are wanted" in message for message in caplog.messages)
    found, taken = steps_run(sd15, run, steps=STEPS)
    assert taken == STEPS - 2 and found.losses == trained.losses


def test_training_that_ran_out_of_memory_goes_on_with_checkpointing(sd15, trained, run, kept):
    calls = []

    def fail_from_the_third_step_on(module, args):
        calls.append(args)
        if len(calls) >= 3:
            raise MemoryError

    handle = sd15.model.model.diffusion_model.out.register_forward_pre_hook(fail_from_the_third_step_on)
    with pytest.raises(MemoryError):
        run(sd15, steps=STEPS)
    handle.remove()
    found, taken = steps_run(sd15, run, steps=STEPS, gradient_checkpointing=True)
    assert taken == STEPS - 2
    assert found.losses == pytest.approx(trained.losses, rel=1e-5)


def test_training_is_kept_from_time_to_time(sd15, run, kept, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.learning.checkpoint.SAVE_INTERVAL_SECONDS", 0.0)
    seen = []
    handle = sd15.model.model.diffusion_model.out.register_forward_pre_hook(lambda *_: seen.append(len(kept())))
    run(sd15, steps=3)
    handle.remove()
    assert seen == [0, 1, 1]
    assert len(kept()) == 1


def test_file_of_a_stopped_training_that_is_damaged_is_named_and_left(sd15, run, stop, kept):
    stop(1, steps=2)
    (file,) = kept()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=rf"stopped before.*Delete {re.escape(str(file))} to begin anew"):
        run(sd15, steps=2)
    assert kept() == [file]
    file.unlink()
    run(sd15, steps=2)


def test_weights_that_were_moved_since_they_were_loaded_are_read(sd15, run):
    weight = next(sd15.vae.first_stage_model.parameters())
    before = weight.data
    weight.data = before.clone()  # as a move does, to a weight that was made in inference mode
    try:
        assert len(run(sd15).losses) == 1
    finally:
        weight.data = before


def test_folder_that_cannot_be_written_is_told_and_ends_nothing(comfy_host, sd15, run, stop, kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    stop(1, steps=2)  # Cancel stays a cancel
    assert any("could not be kept" in message and "No space left" in message for message in caplog.messages)
    monkeypatch.setattr("sa_inject.nodes.host.learning.checkpoint.SAVE_INTERVAL_SECONDS", 0.0)
    assert len(run(sd15, steps=2).losses) == 2
    assert kept() == []


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_is_the_trainings_alone(sd15, before, trained, run, evidence, precision):
    dtypes, of_text = [], []
    layer = sd15.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp.fc1
    handles = [
        sd15.model.model.diffusion_model.out.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype)),
        layer.register_forward_hook(lambda m, i, out: of_text.append(out.dtype)),
    ]
    found = run(sd15, precision=precision)
    for handle in handles:
        handle.remove()
    assert set(dtypes) == {{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]}
    # Some text encoders compute what float16 cannot hold.
    assert set(of_text) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert found.losses == pytest.approx(trained.losses[:1], rel=0.02)
    assert all(tensor.isfinite().all() for tensor in tensors_of(found.adapter).values())
    assert_unchanged(evidence(sd15), before)


def test_fp16_whose_gradients_are_never_numbers_is_no_success(
    sd15, before, run, evidence, comfy_host, kept, monkeypatch
):
    monkeypatch.setattr("sa_inject.trainer.loop.OVERFLOWS_IN_A_ROW", 4)  # each takes as long as a step
    adapters = set((comfy_host.base / "models/sa_inject").rglob("*.safetensors"))
    output = sd15.model.model.diffusion_model.out
    handle = output.register_full_backward_hook(lambda module, inputs, outputs: tuple(x * torch.nan for x in inputs))
    with pytest.raises(RuntimeError, match="4 batches in a row were no numbers in float16.*precision bf16 or fp32"):
        run(sd15, steps=30, precision="fp16")
    handle.remove()
    assert set((comfy_host.base / "models/sa_inject").rglob("*.safetensors")) == adapters and kept() == []
    assert_unchanged(evidence(sd15), before)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_encoder_that_gives_no_numbers_is_named(load_checkpoint, run, batch_size):
    checkpoint = Checkpoint(*load_checkpoint("sd15"))
    with torch.inference_mode():  # as memory that no file has filled may be
        layers = checkpoint.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers
        layers[1].mlp.fc1.weight.fill_(torch.nan)
    captions = ["sainj toy", "a sainj toy", "sainj"]
    with pytest.raises(ValueError, match="text encoder's result for '.*' is not a number.*--fp32-text-enc"):
        run(checkpoint, batch_size=batch_size, captions=captions)


def test_users_lora_counts_and_stays(sd15, before, trained, run, evidence, comfy_host, forget_trainings):
    path = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v"
    lora = {"lora_up.weight": torch.ones(320, 2), "lora_down.weight": torch.ones(2, 320)}
    file = comfy_host.base / "models/loras/up.safetensors"
    save_file({f"{path}.{name}": tensor for name, tensor in lora.items()}, file)
    (model,) = comfy_host.execute("LoraLoaderModelOnly", model=sd15.model, lora_name="up.safetensors", strength_model=1)
    styled = sd15._replace(model=model)
    draw(comfy_host, styled)
    with_lora = evidence(styled)
    assert not torch.equal(with_lora.picture, before.picture)

    for precision in ("auto", "fp32"):
        forget_trainings()  # both are the same here
        found = run(styled, precision=precision)
        assert found.losses[0] != pytest.approx(trained.losses[0], rel=1e-3)
        assert torch.equal(draw(comfy_host, styled), with_lora.picture)
    assert_unchanged(evidence(styled), with_lora)

    draw(comfy_host, sd15)
    assert_unchanged(evidence(sd15), before)


# --- what is learned --------------------------------------------------------------------------------------------------


def test_every_lora_matrix_and_the_token_have_learned(sd15, trained):
    from sa_inject.core.lora import SelfAttentionLoRA
    from sa_inject.nodes.host.text import initial_token_embedding

    info = trained.adapter.info
    fresh = SelfAttentionLoRA(info.layers, info.rank, info.alpha, torch.Generator().manual_seed(0)).state_dict()
    learned = trained.adapter.lora.state_dict()
    assert learned.keys() == fresh.keys() and len(learned) == 4 * len(info.layers)
    half = {key: tensor.half().float() for key, tensor in fresh.items()}
    assert [key for key in learned if torch.equal(learned[key], half[key])] == []
    assert [key for key in learned if key.endswith("lora_B.weight") and (learned[key] == 0).all(dim=1).any()] == []

    word = initial_token_embedding(sd15.clip, "toy", 4)
    assert trained.adapter.token_embedding.keys() == word.keys() == {"clip_l"}
    assert not torch.equal(trained.adapter.token_embedding["clip_l"], word["clip_l"].half().float())


def test_the_lora_sits_on_the_keys_and_values_of_every_layer(trained):
    paths = [layer.path for layer in trained.adapter.info.layers]
    ends = [f"{name}.lora_{part}.weight" for name in ("to_k", "to_v") for part in "AB"]
    assert set(trained.adapter.lora.state_dict()) == {f"base_model.model.{p}.{end}" for p in paths for end in ends}


def test_same_seed_gives_the_same_file_and_another_seed_another(sd15, trained, run):
    torch.manual_seed(99)  # the world's chance has no part in it, and goes on undisturbed
    state = torch.get_rng_state()
    again = run(sd15, steps=STEPS, file_name="same seed")
    assert torch.equal(torch.get_rng_state(), state)
    assert again.losses == trained.losses
    assert again.tensors.keys() == trained.tensors.keys()
    assert all(same_bytes(again.tensors[key], tensor) for key, tensor in trained.tensors.items())
    own = ("date", "modelspec.date", "modelspec.title")
    assert {k: v for k, v in again.metadata.items() if k not in own} == {
        k: v for k, v in trained.metadata.items() if k not in own
    }

    other = run(sd15, seed=2**64 - 1)
    assert other.losses[0] != trained.losses[0]
    first = trained.adapter.info.layers[0].path
    key = f"base_model.model.{first}.to_k.lora_A.weight"
    assert (other.tensors[key] - trained.tensors[key]).norm() > trained.tensors[key].norm()


def test_gradient_checkpointing_changes_nothing_but_memory(sd15, trained, run):
    found = run(sd15, steps=STEPS, gradient_checkpointing=True)
    assert found.losses == pytest.approx(trained.losses, rel=1e-5)
    learned = trained.adapter.lora.state_dict()
    for key, tensor in found.adapter.lora.state_dict().items():
        assert (tensor - learned[key]).norm() < 1e-2 * learned[key].norm()


def test_learning_rate_zero_freezes(sd15, run):
    from sa_inject.nodes.host.text import initial_token_embedding

    no_lora = run(sd15, lora_learning_rate=0.0).adapter
    assert all((t == 0).all() for key, t in no_lora.lora.state_dict().items() if key.endswith("lora_B.weight"))
    no_token = run(sd15, token_learning_rate=0.0).adapter
    assert torch.equal(
        no_token.token_embedding["clip_l"], initial_token_embedding(sd15.clip, "toy", 4)["clip_l"].half().float()
    )


class Family(NamedTuple):
    kind: str
    checkpoint: Checkpoint
    before: Evidence
    trained: Trained
    after: Evidence


@pytest.fixture(scope="module", params=LEARNING_STEPS)
def family(request, load_checkpoint, comfy_host, run, evidence) -> Family:
    """Every kind of checkpoint, trained at a high learning rate."""
    kind = request.param
    checkpoint = Checkpoint(*load_checkpoint(kind))
    draw(comfy_host, checkpoint)
    before = evidence(checkpoint)
    rates = {"lora_learning_rate": 1e-2, "token_learning_rate": 1e-2, "rank": 4, "alpha": 4.0}
    trained = run(checkpoint, steps=LEARNING_STEPS[kind], **rates)
    return Family(kind, checkpoint, before, trained, evidence(checkpoint))


def test_every_family_trains_and_stays_as_it_was(family):
    info, kind = family.trained.adapter.info, family.kind
    assert info.architecture == {"sd1": "SD1.x", "sd2": "SD2.x", "sdx": "SDXL"}[kind[:3]]
    assert info.training["prediction_type"] == ("v_prediction" if kind == "sd2_v" else "eps")
    encoders = {"sd1": {"clip_l"}, "sd2": {"clip_h"}, "sdx": {"clip_l", "clip_g"}}[kind[:3]]
    assert set(family.trained.adapter.token_embedding) == encoders
    learned = family.trained.adapter.lora.state_dict()
    assert [key for key, tensor in learned.items() if key.endswith("lora_B.weight") and not tensor.any()] == []
    assert all(tensor.isfinite().all() for tensor in learned.values())
    assert_unchanged(family.after, family.before)


@pytest.mark.parametrize("family", [kind for kind, steps in LEARNING_STEPS.items() if steps > 2], indirect=True)
def test_loss_on_held_out_noise_falls(family):
    before, after = held_out_losses(family.checkpoint, family.trained.adapter)
    assert after < 0.95 * before


@torch.inference_mode()
def held_out_losses(checkpoint: Checkpoint, adapter: Any) -> tuple[float, float]:
    """The training objective on noise that training did not draw, with a fresh adapter and with the given one."""
    import comfy.model_management as model_management

    from sa_inject.core.lora import SelfAttentionLoRA
    from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser
    from sa_inject.nodes.host.networks.unet import compute_dtype
    from sa_inject.nodes.host.text import clip_with_token, initial_token_embedding
    from sa_inject.trainer.objective import prediction_loss

    model, clip, vae = checkpoint
    info, base = adapter.info, model.model
    model_management.load_models_gpu([model, clip.patcher])
    images = pictures(3)
    latents = base.process_latent_in(torch.cat([vae.encode(image[None]) for image in images]))
    device, dtype = model.load_device, compute_dtype(base)

    def mean_loss(lora: Any, tokens: dict[str, torch.Tensor]) -> float:
        patched_clip = clip_with_token(clip, "sainj", tokens)
        denoiser = ComfyDenoiser(
            base, model.get_model_object("model_sampling"), patched_clip, info.layers, device, dtype
        )
        generator = torch.Generator().manual_seed(1234)
        text, read = denoiser.encode(["a photo of sainj toy"] * 3), denoiser.encode(["toy"] * 3)
        bank = denoiser.read_reference(latents.roll(1, 0), None, read, None, lora.deltas(device, dtype))
        losses = []
        for place in (200, 500, 800):
            noise = torch.randn(latents.shape, generator=generator)
            sigma = denoiser.sigmas[place].expand(3)
            denoised = denoiser.denoise(denoiser.add_noise(latents, noise, sigma), sigma, text, bank)
            losses.append(prediction_loss(denoised, latents, denoiser.output_scale(sigma)).mean())
        return torch.stack(losses).mean().item()

    fresh = SelfAttentionLoRA(info.layers, info.rank, info.alpha, torch.Generator().manual_seed(0))
    return mean_loss(fresh, initial_token_embedding(clip, "toy", 4)), mean_loss(adapter.lora, adapter.token_embedding)


# --- what it learns from ----------------------------------------------------------------------------------------------


@pytest.fixture
def latents_seen(sd15):
    """(rows, height, width) of every call of the frozen UNet; the reference pass ends before its output."""
    seen = []
    output = sd15.model.model.diffusion_model.out
    handle = output.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), *args[0].shape[-2:])))
    yield seen
    handle.remove()


def test_batch_and_accumulation_multiply_the_pictures_of_a_step(sd15, run, latents_seen):
    found = run(sd15, batch_size=3, gradient_accumulation=2, seed=2)
    assert len(found.losses) == 1
    assert [rows for rows, *_ in latents_seen if rows == 3] and sum(rows for rows, *_ in latents_seen) == 3 * 2
    settings = found.adapter.info.training
    assert (settings["batch_size"], settings["gradient_accumulation"]) == (3, 2)


def test_pictures_of_different_sizes_keep_their_aspect(sd15, run, latents_seen):
    images = [pictures(1), pictures(1, 32, 128), pictures(1, 200, 50), pictures(1, 30, 30)]
    found = run(sd15, images=images, batch_size=4)
    assert {tuple(size) for _, *size in latents_seen} == {(8, 8), (8, 16), (16, 8)}
    assert sum(rows for rows, *_ in latents_seen) == 4
    assert found.adapter.info.training["pictures"] == 4


def test_opaque_rgba_and_half_precision_train_like_rgb(sd15, trained, run):
    rgba = torch.cat([pictures(3), torch.ones(3, 64, 64, 1)], dim=-1)
    assert run(sd15, images=rgba).losses == trained.losses[:1]
    assert run(sd15, images=[pictures(3).half()]).losses == pytest.approx(trained.losses[:1], rel=1e-2)


def test_transparent_parts_do_not_count(sd15, run, forget_trainings):
    ground = torch.cat([torch.rand(3, 64, 64, 3), torch.zeros(3, 64, 64, 1)], dim=-1)
    other = torch.cat([torch.rand(3, 64, 64, 3), torch.zeros(3, 64, 64, 1)], dim=-1)
    first = run(sd15, images=ground)
    forget_trainings()
    assert run(sd15, images=other).losses == first.losses


def test_dataset_nodes_plug_in(sd15, run, comfy_host, latents_seen):
    folder = comfy_host.base / "input" / "subject"
    folder.mkdir()
    for number, (width, height) in enumerate([(64, 64), (128, 32)]):
        Image.new("RGB", (width, height), ("red", "blue")[number]).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a sainj toy on grass")  # the other has none
    (images,) = comfy_host.execute("LoadImageDataSetFromFolder", folder="subject")
    plain = run(sd15, images=images, batch_size=2)
    images, captions = comfy_host.execute("LoadImageTextDataSetFromFolder", folder="subject")
    assert sorted(captions) == ["", "a sainj toy on grass"]
    captioned = run(sd15, images=images, captions=captions, batch_size=2)
    assert {tuple(size) for _, *size in latents_seen} == {(8, 8), (8, 16)}
    assert captioned.losses != plain.losses


def test_one_caption_serves_all_pictures(sd15, run):
    text = "a photo of SAINJ toy, on the moon"
    assert run(sd15, captions=[text]).losses == run(sd15, captions=[text] * 3).losses


def test_white_masks_are_no_masks_and_others_count(sd15, trained, run):
    white = run(sd15, masks=torch.ones(1, 64, 64))
    assert white.losses == pytest.approx(trained.losses[:1], rel=1e-4)
    half = torch.zeros(3, 64, 64)
    half[:, :, :32] = 1
    assert run(sd15, masks=half).losses[0] != pytest.approx(trained.losses[0], rel=1e-3)


def test_one_picture_works_through_augmented_views(sd15, run, caplog):
    with caplog.at_level(logging.INFO):
        found = run(sd15, images=pictures(1))
    assert any("one picture only" in message and "augmented" in message for message in caplog.messages)
    assert torch.isfinite(torch.tensor(found.losses)).all() and found.adapter.info.training["pictures"] == 1


def test_a_picture_that_is_there_twice_counts_once_and_keeps_both_captions(sd15, run, caplog):
    captions = ["a sainj toy", "sainj toy on grass", "a photo of sainj toy"]
    with caplog.at_level(logging.INFO):
        repeated = run(sd15, images=pictures(3)[[0, 1, 1]], captions=captions, batch_size=8)
    assert any("1 of 3 pictures are there more than once" in message for message in caplog.messages)
    once = run(sd15, images=pictures(3)[:2], captions=captions[:2], batch_size=8)
    assert repeated.losses != once.losses  # for the third caption is drawn, too
    all_alike = run(sd15, images=pictures(3)[[0, 0, 0]])
    assert all_alike.losses == run(sd15, images=pictures(3)[:1]).losses


def test_matched_mode_noises_the_reference(sd15, trained, run):
    found = run(sd15, steps=2, reference_mode="noised", gradient_checkpointing=True)
    assert found.adapter.info.reference_mode == found.metadata["reference_mode"] == "noised"
    assert found.losses[1] != trained.losses[1]  # the first still draws the base model's picture
    assert [k for k, t in found.adapter.lora.state_dict().items() if k.endswith("B.weight") and not t.any()] == []


# --- what the user sees -----------------------------------------------------------------------------------------------


def test_progress_tells_step_loss_and_time_left_every_step(sd15, run, shown_texts, monkeypatch, caplog):
    import comfy.utils

    bar = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *a, **k: bar.append((value, total)))
    with caplog.at_level(logging.INFO):
        found = run(sd15, steps=3, file_name="told")
    assert bar == [(1, 3), (2, 3), (3, 3)]
    known, *steps, last = shown_texts
    assert known.startswith("3 pictures, 6 pairs") and "A step takes about" in known
    shown = [re.fullmatch(r"step (\d)/3, loss (\d+\.\d{4})(?:, \d+:\d\d left)?", text).groups() for text in steps]
    assert [number for number, _ in shown] == ["1", "2", "3"]
    assert float(shown[0][1]) == pytest.approx(found.losses[0], abs=1e-4)
    assert last == f"saved {found.adapter.name}.safetensors"

    ours = [record for record in caplog.records if record.name.startswith("sa_inject")]
    *_, done, saved = [record.getMessage() for record in ours if record.levelno == logging.INFO]  # other adapters warn
    assert re.fullmatch(r"Trained adapter '\S+': 3 steps, final loss \d+\.\d{4}\.", done)
    assert saved.startswith("Saved adapter")


def test_loss_map_is_what_the_hosts_graph_node_draws(comfy_host, trained):
    comfy_host.node("LossGraphNode")
    graph = comfy_host.execute("LossGraphNode", loss={"loss": trained.losses})
    assert graph.ui["images"]


def test_previews_are_drawn_with_the_adapter_or_not_at_all(sd15, trained, run, monkeypatch):
    assert torch.equal(trained.previews, pictures(3)[:1])
    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 2)
    found = run(sd15, previews=2, seed=7)
    assert found.previews.shape == (2, 64, 64, 3) and found.previews.isfinite().all()
    assert not torch.equal(found.previews[0], found.previews[1])

    from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage
    from sa_inject.nodes.host.drawing.preview import draw_previews

    with torch.inference_mode():
        prompt = ImagePrompt((ReferenceImage(sd15.vae.encode(pictures(1))),))
        again, other = (draw_previews(*sd15, found.adapter, prompt, 2, seed) for seed in (7, 8))
    assert torch.allclose(again, found.previews, atol=1e-4) and not torch.allclose(other, found.previews, atol=1e-2)
