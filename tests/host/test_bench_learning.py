"""The quality bench trains through its own set-up of the pack's loop, with the same result as the node."""

import pytest
import torch

from tests.demo.conftest import artwork  # noqa: F401  # a fixture
from tests.host.trainings import pictures

STEPS = 8
# One of those that are built alike.
ABLATED = (
    "LoRA in the whole pass",
    "K and V, in the whole pass",
    "rank 4",
    "last step, not averaged",
    "word not learned",
    "word first",
    "no LoRA",
    "projected by the base",
    "concatenated",
    "whole values, added",
    "middle and decoder only",
    "middle and decoder only, trained so",
    "references read with the word",
    "references lightly noised",
    "references read as clean",
    "references told the picture's level",
    "noised",
    "own beginnings",
    "LoRA on both",
    "identical pairs",
    "both rows",
    "references from 0.0",
    "2 references",
    "strength 2.0",
    "cfg 4.5, both rows",
)
RATE = 1e-2  # large: what was learned has to matter to the next step


@pytest.fixture(scope="module")
def task(bench, load_checkpoint):
    """`task(dtype)` opens a classroom on a tiny SD1.5."""
    from bench.quality.learn import Models, training_setup
    from sa_inject.nodes.host.images import split_images
    from sa_inject.nodes.host.learning import training_set
    from sa_inject.trainer.config import TrainConfig

    loaded = load_checkpoint("sd15")

    def open_room(dtype: torch.dtype):
        taken = split_images([pictures(3)], "bench")
        subject = training_set.Subject(taken, [None] * 3, [], "sainj", "toy", 64)
        config = TrainConfig(
            steps=STEPS, lora_learning_rate=RATE, token_learning_rate=1e-3, rank=2, alpha=2.0, seed=1, batch_size=1
        )
        return training_setup(Models(*loaded, dtype), subject, config)

    return open_room


def test_weights_that_are_cast_once_compute_the_same(bench):
    from bench.quality.learn import cast_once

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4, bias=False))
    x = torch.randn(3, 8, requires_grad=True)

    def computed(enabled: bool) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled):
            out = layers(x)
        return out, *torch.autograd.grad(out.float().square().sum(), x)

    expected = [computed(True), computed(False)]
    with cast_once(layers, torch.bfloat16):
        assert "forward" in vars(layers[0]) and "forward" in vars(layers[2])
        found = [computed(True), computed(False)]
    assert "forward" not in vars(layers[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mask", [None, "leaves out", "adds"])
def test_written_out_attention_is_the_kernels(bench, mask):
    from bench.quality.learn import attention_written_out

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (5, 7, 7))
    masks = {"leaves out": torch.rand(5, 7) < 0.7, "adds": torch.randn(5, 7, dtype=torch.bfloat16)}

    def computed() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=masks.get(mask), dropout_p=0.0, is_causal=False
        )
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    kernel = computed()
    with attention_written_out():
        written = computed()
        name = type(torch.nn.functional.scaled_dot_product_attention(q, k, v).grad_fn).__name__
    assert "Attention" not in name
    assert "Attention" in type(torch.nn.functional.scaled_dot_product_attention(q, k, v).grad_fn).__name__
    for ours, theirs in zip(written, kernel, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_is_not_written_out_is_left_to_the_kernel(bench):
    from bench.quality.learn import attention_written_out

    q = torch.randn(1, 1, 6, 8, dtype=torch.bfloat16, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    with attention_written_out():
        found = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        scaled = torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=2.0)
    assert torch.equal(found, attend(q, q, q, is_causal=True))
    assert torch.equal(scaled, attend(q, q, q, scale=2.0))


def test_a_lesson_ends_with_the_nodes_adapter(task, comfy_host, load_checkpoint):
    model, clip, vae = load_checkpoint("sd15")
    adapter, *_ = comfy_host.execute(
        "TrainSAInjectAdapter",
        model=model,
        clip=clip,
        vae=vae,
        images=pictures(3),
        placeholder_token="sainj",
        class_word="toy",
        resolution=64,
        steps=STEPS,
        lora_learning_rate=RATE,
        token_learning_rate=1e-3,
        rank=2,
        alpha=2.0,
        seed=1,
        precision="fp32",
        previews=0,
        sample_every=0,
        file_name="test_bench_learning",
    )
    with task(torch.float32) as setup:
        setup.train(setup.lora)
        in_lesson, by_node = (numbers_of(lora) for lora in (setup.lora, adapter.lora))
    torch.testing.assert_close(in_lesson, by_node, atol=1e-3, rtol=1e-2)


def numbers_of(lora) -> torch.Tensor:
    """-> (n,)"""
    return torch.cat([tensor.flatten() for tensor in lora.state_dict().values()])


def test_half_precision_computes_with_what_it_has_learned(task):
    """It did not while autocast kept its copies of the first step's weights: the loss was that of no learning."""

    def losses(rate: float) -> list[float]:
        from bench.quality.learn import Trainables

        with task(torch.bfloat16) as setup:
            weights = [p.requires_grad_() for name, p in setup.unet.named_parameters() if name.endswith("to_q.weight")]
            return setup.train(
                Trainables(weights), lora_learning_rate=rate, token_learning_rate=0.0, reference_dropout=1.0, steps=3
            )

    still, learning = losses(1e-30), losses(1e-4)
    assert learning[0] == still[0]
    assert learning[2] != still[2]


def test_unseen_loss_is_the_error_of_the_predicted_noise(bench, artwork, comfy_host, load_checkpoint):  # noqa: F811
    import numpy as np

    from bench.quality.learn import Models
    from bench.quality.methods import base_model
    from bench.quality.subjects import Settings, make_subject, table_artworks
    from bench.quality.task import TrainingTask
    from bench.quality.validation_loss import LEVELS, SEED, unseen_loss
    from demo.base.scenes import render

    model, clip, vae = load_checkpoint("sd15")
    subject = make_subject(table_artworks(1)[0], prompts=3)
    task = TrainingTask(comfy_host, Models(model, clip, vae, torch.float32), subject, Settings(1, 1, 1, 1.0), 0.0)
    found = unseen_loss(task, base_model(task))
    assert len(found) == len(LEVELS)

    texts = subject.prompt_texts(subject.artwork.class_word)
    context = torch.cat([comfy_host.execute("CLIPTextEncode", clip=clip, text=text)[0][0][0] for text in texts])
    with torch.inference_mode():
        scenes = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in subject.prompts])).float() / 255
        clean = model.model.process_latent_in(vae.encode(scenes))
        generator = torch.Generator().manual_seed(SEED)
        for level, loss in list(zip(LEVELS, found, strict=True))[:2]:
            sigma = model.model.model_sampling.sigmas[level]
            noise = torch.randn(clean.shape, generator=generator)
            levels = torch.full((len(clean),), float(sigma))
            denoised = model.model.apply_model(clean + sigma * noise, levels, c_crossattn=context)
            predicted = (clean + sigma * noise - denoised) / sigma
            assert loss == pytest.approx(float((predicted - noise).square().mean()), rel=1e-4)


@pytest.fixture(scope="module")
def whole_lesson(bench, artwork, comfy_host, load_checkpoint):  # noqa: F811
    """`whole_lesson()` is one of the bench's, with few steps and small pictures, on a tiny SD1.5 of its own."""
    from bench.quality.learn import Models
    from bench.quality.subjects import Settings, choice_artworks, make_subject
    from bench.quality.task import TrainingTask

    settings = Settings(steps=2, batch=2, sampler_steps=2, cfg=3.0)
    subject = make_subject(choice_artworks(1)[0])

    def task():
        models = Models(*load_checkpoint("sd15"), torch.float32)
        return TrainingTask(comfy_host, models, subject, settings, RATE, RATE)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("task", "drawing"):
            patch.setattr(f"bench.quality.{module}.IMAGE_SIZE", 64)
        yield task


def test_prompts_are_drawn_at_once_as_one_by_one(whole_lesson):
    from bench.quality.drawing import sample
    from bench.quality.methods import ours

    task = whole_lesson()
    patched_clip = ours(task)
    texts = task.subject.prompt_texts(patched_clip.words)[:3]
    alone, at_once = (sample(task, patched_clip, texts, 2, [5, 6, 7], of_call=of_call) for of_call in (1, 2))
    assert alone.shape[0] == 6
    assert torch.allclose(at_once, alone, rtol=1e-4, atol=1e-4)
    assert len({tuple(picture.flatten()[:4].tolist()) for picture in alone}) == 6  # no two pictures share their noise


@pytest.fixture(scope="module")
def drawn(whole_lesson):
    """`drawn(name)` lets an ablation learn and draw a picture; latents (1, c, h, w)."""
    from bench.quality.ablations import ABLATIONS, as_changed
    from bench.quality.drawing import sample

    def draw(name: str) -> torch.Tensor:
        task = whole_lesson()
        with as_changed(name):
            patched_clip = ABLATIONS[name](task)
            return sample(task, patched_clip, [f"a photo of {patched_clip.words}"], 1, [3])

    return draw


@pytest.fixture(scope="module")
def drawn_as_it_is(drawn):
    return drawn("as it is")


def test_the_same_ablation_draws_the_same(drawn, drawn_as_it_is):
    from bench.quality.ablations import _learned

    _learned.clear()  # it would be drawn with the adapter that is there, and learn nothing
    assert torch.equal(drawn("as it is"), drawn_as_it_is)


@pytest.mark.parametrize("name", ABLATED)
def test_an_ablation_changes_the_picture(drawn, drawn_as_it_is, name):
    assert (drawn(name) - drawn_as_it_is).abs().max() > 1e-4
