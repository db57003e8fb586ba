"""What a training step computes, against what anyone would compute who sees the UNet's calls from outside.

The first step draws as the base model does, for a fresh adapter adds nothing. So its loss follows from the pictures,
the stock text encode node, and the published objectives of the models.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sa_inject.core.image_prompt import TextConditioning  # pyright: ignore[reportMissingImports]
from sa_inject.core.kv import KV  # pyright: ignore[reportMissingImports]
from tests.host.adapters import apply, base_model, call_unet, load, make_adapter, random, reference_text, relative_error
from tests.host.learned_words import encoded
from tests.host.test_reference_pass import frozen_copy, keys_and_values, merged_copy, worst_error
from tests.host.trainings import SMALL, Checkpoint, pictures

CAPTIONS = ["sainj toy on grass", "a photo of sainj toy", "the sainj toy, at night"]
PLAIN = [caption.replace("sainj", "toy") for caption in CAPTIONS]  # what the word means before it has learned
EXACT = 1e-4


class Call(NamedTuple):
    x: Tensor
    timestep: Tensor
    context: Tensor
    y: Tensor | None
    out: Tensor | None  # None: the pass was left early, as the reading of an image prompt is


@dataclass
class Watched:
    """The calls of a UNet, from outside."""

    calls: list[Call] = field(default_factory=list)
    _open: list[Call] = field(default_factory=list)

    def before(self, module: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("x", "timestep", "context", "y"), args, strict=False)) | kwargs
        self._close(None)
        kept = [given[name].detach().clone() for name in ("x", "timestep", "context")]
        self._open.append(Call(*kept, given.get("y"), None))

    def after(self, module: Any, args: Any, out: Tensor) -> None:
        self._close(out.detach().clone())

    def _close(self, out: Tensor | None) -> None:
        self.calls += [call._replace(out=out) for call in self._open]
        self._open = []

    @property
    def drawn(self) -> list[Call]:
        return [call for call in self.calls if call.out is not None]

    @property
    def read(self) -> list[Call]:
        return [call for call in self.calls if call.out is None]


class Trained(NamedTuple):
    checkpoint: Checkpoint
    calls: Watched
    loss: float
    latents: Tensor  # of the pictures, as the model wants them
    adapter: Any


@pytest.fixture(scope="module")
def trained(comfy_host, pack_nodes, load_checkpoint) -> Callable[..., Trained]:
    """`trained("sd15", layer=-2, has_masks=True)`: one step over all pictures, and what the UNet was called with."""
    checkpoints: dict[str, Checkpoint] = {}

    def train(kind: str, layer: int | None = None, has_masks: bool = False, **inputs) -> Trained:
        if kind not in checkpoints:
            checkpoints[kind] = Checkpoint(*load_checkpoint(kind))
        model, clip, vae = checkpoints[kind]
        if layer is not None:
            (clip,) = comfy_host.execute("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=layer)
        calls, unet = Watched(), model.model.diffusion_model
        handles = [
            unet.register_forward_pre_hook(calls.before, with_kwargs=True),
            unet.register_forward_hook(calls.after),
        ]
        subject = {"images": pictures(3), "captions": CAPTIONS, "batch_size": 3, "token_vectors": 1}
        if has_masks:
            subject["masks"] = cell_masks().repeat_interleave(8, 1).repeat_interleave(8, 2)
        inputs = {"model": model, "clip": clip, "vae": vae, **SMALL, **subject, **inputs}
        try:
            adapter, _, losses, *_ = comfy_host.execute("TrainSAInjectAdapter", **inputs)
        finally:
            for handle in handles:
                handle.remove()
        with torch.inference_mode():
            latents = model.model.process_latent_in(torch.cat([vae.encode(p[None]) for p in pictures(3)]))
        return Trained(Checkpoint(model, clip, vae), calls, losses["loss"][0], latents, adapter)

    return functools.cache(train)


def nearest(rows: Tensor, options: Sequence[Tensor]) -> list[int]:
    """For each row the place of the option that it is. (b, ...) and (1, ...) each"""
    errors = torch.stack([((rows - option) ** 2).flatten(1).mean(1) / option.square().mean() for option in options])
    best, places = errors.min(dim=0)
    assert (best < 1e-6).all()
    return places.tolist()


def sigmas_of(model: Any, timestep: Tensor) -> Tensor:
    """(b, 1, 1, 1)"""
    return torch.stack([model.get_model_object("model_sampling").sigma(t) for t in timestep]).view(-1, 1, 1, 1)


@torch.inference_mode()
def expected_losses(comfy_host: Any, found: Trained, is_v: bool, masks: Tensor | None) -> dict[int, float]:
    """The loss of every picture that was drawn, by its number, from the calls alone."""
    model, clip, _ = found.checkpoint
    texts = [encoded(comfy_host, clip, text) for text in PLAIN]
    losses: dict[int, float] = {}
    for call in found.calls.drawn:
        sigma = sigmas_of(model, call.timestep)
        for row, number in enumerate(nearest(call.context, texts)):
            s, x0 = sigma[row : row + 1], found.latents[number : number + 1]
            noise = (call.x[row : row + 1] * (s**2 + 1).sqrt() - x0) / s
            assert 0.7 < noise.std() < 1.3 and noise.mean().abs() < 0.35  # else it is another picture, or scale
            target = (noise - s * x0) / (s**2 + 1).sqrt() if is_v else noise
            error = (call.out[row : row + 1] - target).square().mean(1)[0]  # (h, w)
            weight = torch.ones_like(error) if masks is None else masks[number]
            losses[number] = float((error * weight).sum() / weight.sum())
    return losses


def cell_masks() -> Tensor:
    """White on the left half, the upper left corner, and nearly everything."""
    cells = torch.zeros(3, 8, 8)
    cells[0, :, :4] = 1
    cells[1, :3, :5] = 1
    cells[2, 1:] = 1
    return cells


@pytest.mark.parametrize(
    "kind, layer, masked",
    [("sd15", None, False), ("sd15", -2, True), ("sd2_v", None, True), ("sdxl", None, False)],
    ids=["sd15", "sd15 at clip skip 2 with masks", "sd2 v with masks", "sdxl"],
)
def test_loss_is_the_models_own_objective_over_the_subject(comfy_host, trained, kind, layer, masked):
    found = trained(kind, layer, masked)
    losses = expected_losses(comfy_host, found, kind == "sd2_v", cell_masks() if masked else None)
    assert set(losses) == {0, 1, 2}  # every picture with its own caption
    assert found.loss == pytest.approx(sum(losses.values()) / 3, rel=EXACT)


@pytest.mark.parametrize("mode, layer", [("clean", -2), ("noised", None)])
def test_image_prompt_is_another_picture_read_with_the_class_word(comfy_host, trained, mode, layer):
    found = trained("sd15", layer, reference_mode=mode, seed=5)
    model, clip, _ = found.checkpoint
    texts, class_word = [encoded(comfy_host, clip, text) for text in PLAIN], encoded(comfy_host, clip, "toy")
    clean = float(model.get_model_object("model_sampling").percent_to_sigma(0.75))
    assert found.calls.read
    for read, drawn in itertools.pairwise(found.calls.calls):
        if read.out is not None:
            continue
        assert relative_error(read.context, class_word.expand_as(read.context)) < 1e-5
        sigma = sigmas_of(model, read.timestep)
        scaled = read.x * (sigma**2 + 1).sqrt()
        targets = nearest(drawn.context, texts)
        if mode == "clean":
            assert torch.allclose(sigma, torch.full_like(sigma, clean), rtol=1e-3)
            pictured = nearest(scaled, list(found.latents.split(1)))
            assert all(picture != target for picture, target in zip(pictured, targets, strict=True))
        else:
            assert torch.equal(read.timestep, drawn.timestep)
            for row, target in enumerate(targets):
                noises = (scaled[row : row + 1] - found.latents) / sigma[row]  # (pictures, c, h, w)
                others = [noises[n] for n in range(3) if n != target]
                assert min(abs(float(noise.std()) - 1) for noise in others) < 0.3
    assert relative_error(found.adapter.class_conditioning.cross_attn, class_word) < 1e-3  # as float16 keeps it


def test_sdxl_is_told_the_size_and_the_pooled_text(comfy_host, trained):
    found = trained("sdxl", None, False)
    model, clip, _ = found.checkpoint
    texts = [encoded(comfy_host, clip, text) for text in PLAIN]
    pooled = [comfy_host.execute("CLIPTextEncode", clip=clip, text=text)[0][0][1]["pooled_output"] for text in PLAIN]
    read = comfy_host.execute("CLIPTextEncode", clip=clip, text="toy")[0][0][1]["pooled_output"]
    for call in found.calls.drawn:
        numbers = nearest(call.context, texts)
        expected = torch.cat([model.model.encode_adm(pooled_output=pooled[n], width=64, height=64) for n in numbers])
        assert call.y is not None and relative_error(call.y, expected) < EXACT
    for call in found.calls.read:
        expected = model.model.encode_adm(pooled_output=read, width=64, height=64)
        assert call.y is not None and relative_error(call.y, expected.expand_as(call.y)) < EXACT


@torch.inference_mode()
def test_sdxl_is_told_width_and_height_of_a_wide_picture(comfy_host):
    from sa_inject.nodes.host.networks.unet import model_conditions  # pyright: ignore[reportMissingImports]

    model = load(base_model(comfy_host, "sdxl"))
    text = reference_text(model, seed=3)
    found = model_conditions(model.model, torch.zeros(1, 4, 8, 16), text)["y"]
    assert torch.equal(found, model.model.encode_adm(pooled_output=text.pooled, width=128, height=64))


@torch.inference_mode()
def test_captions_that_repeat_stay_with_their_rows(comfy_host, trained):
    from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser  # pyright: ignore[reportMissingImports]

    model, clip, _ = trained("sd15").checkpoint
    load(clip.patcher)
    sampling = model.get_model_object("model_sampling")
    denoiser = ComfyDenoiser(model.model, sampling, clip, [], model.load_device, torch.float32)
    captions = ["a dog", "a red car", "a dog", "a dog", "a tree"]
    found = denoiser.encode(captions).cross_attn
    for row, caption in zip(found.split(1), captions, strict=True):
        assert relative_error(row, encoded(comfy_host, clip, caption)) < 1e-5


def test_views_of_a_single_picture_keep_its_mask(pack_nodes, trained):
    from sa_inject.nodes.host.learning.training_set import Subject, training_set  # pyright: ignore[reportMissingImports]

    model, _, vae = trained("sd15").checkpoint
    mask = torch.zeros(64, 64)
    mask[16:48, 8:40] = 1
    picture = pictures(1).movedim(-1, 1)
    with torch.inference_mode():
        data = training_set(model, vae, Subject([picture], [mask], None, "sainj", "toy", 64), [("sainj",)], seed=3)
    (example,) = data.examples
    assert example.mask is not None and example.mask[3, 2] == 1 and example.mask.mean() == mask.mean()
    masks = [view.mask for view in data.views]
    assert len(masks) > 1 and all(m is not None and m.shape == (8, 8) and 0 < m.mean() < 1 for m in masks)
    assert len({tuple(m.flatten().tolist()) for m in masks if m is not None}) > 1  # moved with the picture


# --- with an adapter that adds something ------------------------------------------------------------------------------


def denoiser_of(model: Any, adapter: Any) -> Any:
    from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser  # pyright: ignore[reportMissingImports]

    sampling = model.get_model_object("model_sampling")
    return ComfyDenoiser(model.model, sampling, None, adapter.info.layers, model.load_device, torch.float32)


@pytest.mark.parametrize("kind", ["sd15", "sd15_inpaint", "sd2_v", "sdxl"])
@torch.inference_mode()
def test_training_reads_each_row_at_its_own_noise_level(comfy_host, kind):
    model = load(base_model(comfy_host, kind))
    adapter = make_adapter(model)
    latents, sigmas = random(2, 4, 8, 8, seed=3), (0.7, 5.0)
    text = adapter.class_conditioning.expand(2)
    deltas = adapter.lora.deltas(model.load_device, torch.float32)
    read = denoiser_of(model, adapter).read_reference(latents, torch.tensor(sigmas), text, None, deltas)
    frozen, merged = frozen_copy(model), merged_copy(model, adapter)
    for row, sigma in enumerate(sigmas):
        found = {key: KV(r.kv.k[row : row + 1], r.kv.v[row : row + 1]) for key, r in read.items()}
        expected = keys_and_values(frozen, merged, adapter, latents[row : row + 1], sigma)
        assert worst_error(found, expected) < EXACT


@pytest.mark.parametrize("kind", ["sd15", "sd2_v", "sdxl"])
@torch.inference_mode()
def test_training_denoises_as_drawing_does(comfy_host, kind):
    """Two rows with prompts, pictures, masks and noise levels of their own, against a drawing of each."""
    from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage  # pyright: ignore[reportMissingImports]

    model = load(base_model(comfy_host, kind))
    adapter = make_adapter(model)
    masks = cell_masks()[:2]
    drawn_pictures = [ReferenceImage(random(1, 4, 8, 8, seed=20 + row), masks[row]) for row in range(2)]
    texts = [reference_text(model, seed=30 + row) for row in range(2)]
    noisy, sigmas = 3 * random(2, 4, 8, 8, seed=40), (0.7, 5.0)
    denoiser = denoiser_of(model, adapter)
    latents = model.model.process_latent_in(torch.cat([picture.latent for picture in drawn_pictures]))
    deltas = adapter.lora.deltas(model.load_device, torch.float32)
    bank = denoiser.read_reference(latents, None, adapter.class_conditioning.expand(2), masks, deltas)
    found = denoiser.denoise(noisy, torch.tensor(sigmas), TextConditioning.stack(texts), bank)
    without = denoiser.denoise(noisy, torch.tensor(sigmas), TextConditioning.stack(texts), None)
    for row, (picture, text, sigma) in enumerate(zip(drawn_pictures, texts, sigmas, strict=True)):
        patched = load(apply(comfy_host, model, adapter, ImagePrompt((picture,))))
        conditions = {}
        if text.pooled is not None:
            conditions["y"] = model.model.encode_adm(pooled_output=text.pooled, width=64, height=64)
        x = noisy[row : row + 1]
        expected = call_unet(patched, x, sigma, text.cross_attn, [0], conditions)
        added = (found[row] - without[row]).norm()
        assert (found[row : row + 1] - expected).norm() < 1e-3 * added and added > 0


@pytest.mark.parametrize(
    "node, inputs, slope",
    [
        (None, {}, lambda s: -s),
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, lambda s: -s / (s**2 + 1).sqrt()),
        ("ModelSamplingDiscrete", {"sampling": "x0", "zsnr": False}, lambda s: torch.ones_like(s)),
        (
            "ModelSamplingContinuousEDM",
            {"sampling": "edm_playground_v2.5", "sigma_max": 80.0, "sigma_min": 0.002},
            lambda s: 0.5 * s / (s**2 + 0.25).sqrt(),
        ),
    ],
    ids=["eps", "v", "x0", "edm"],
)
@torch.inference_mode()
def test_loss_is_taken_in_the_space_of_the_networks_output(comfy_host, node, inputs, slope):
    model = base_model(comfy_host, "sd15")
    if node is not None:
        (model,) = comfy_host.execute(node, model=model, **inputs)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    found = denoiser_of(load(model), make_adapter(model)).output_scale(sigma)
    assert torch.allclose(found, slope(sigma).view(-1, 1, 1, 1), rtol=1e-4)
    latent, noise = random(3, 4, 8, 8, seed=1), random(3, 4, 8, 8, seed=2)
    noisy = denoiser_of(model, make_adapter(model)).add_noise(latent, noise, sigma)
    assert torch.allclose(noisy, latent + sigma.view(-1, 1, 1, 1) * noise, rtol=1e-5, atol=1e-5)
