"""The demo's promise, judged by a program: the adapter draws the robot, where and before what the prompt says."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from tests.imagenet_judge import embedder

pytestmark = pytest.mark.comfy

PROMPTS = 8
BASE_PROMPTS = 3
PLACES = 3  # of 167 objects, in the median


class Drawn(NamedTuple):
    scenes: list[Any]
    adapter: list[Image.Image]
    base: list[Image.Image]  # the same prompts with the class word, no adapter


@pytest.fixture(scope="module")
def drawn(comfy_host, pack_nodes, tmp_path_factory) -> Drawn:
    """Train with the demo's own settings on its own pictures, then draw scenes that none of them shows."""
    from sa_inject.demo.base.checkpoint import write_checkpoint
    from sa_inject.demo.base.scenes import caption
    from sa_inject.nodes.host.drawing.preview import SAMPLER, SCHEDULER

    checkpoint = tmp_path_factory.mktemp("demo") / "base.safetensors"
    write_checkpoint(checkpoint)
    model, clip, vae = load(checkpoint)
    run = demo_run()
    pictures = [pixels(Image.open(path)) for path in sorted(run.SUBJECT.glob("*.png"))]
    captions = [path.read_text().strip() for path in sorted(run.SUBJECT.glob("*.txt"))]
    adapter, patched_clip, *_ = comfy_host.execute(
        "TrainSAInjectAdapter", model=model, clip=clip, vae=vae, images=pictures, captions=captions, **run.TRAINING
    )
    prompt = comfy_host.execute("EncodeImagePrompt", images=pictures, vae=vae, resolution=run.SIDE)[0]
    patched = comfy_host.execute("ApplySelfAttnInjection", model=model, adapter=adapter, image_prompt=prompt)[0]
    scenes = new_scenes(PROMPTS)

    def draw(model: Any, clip: Any, word: str, scene: Any, seed: int) -> Image.Image:
        positive, negative = (
            comfy_host.execute("CLIPTextEncode", clip=clip, text=text)[0] for text in (caption(scene, word=word), "")
        )
        empty = comfy_host.execute("EmptyLatentImage", width=run.SIDE, height=run.SIDE, batch_size=1)[0]
        chosen = {**run.SAMPLING, "seed": seed}
        chosen |= {"sampler_name": SAMPLER, "scheduler": SCHEDULER, "denoise": 1.0}
        latent = comfy_host.execute(
            "KSampler", model=model, positive=positive, negative=negative, latent_image=empty, **chosen
        )[0]
        return picture(comfy_host.execute("VAEDecode", samples=latent, vae=vae)[0])

    subject = f"{run.PLACEHOLDER} {run.CLASS_WORD}"
    with_adapter = [draw(patched, patched_clip, subject, scene, seed) for seed, scene in enumerate(scenes)]
    without = [draw(model, clip, run.CLASS_WORD, scene, seed) for seed, scene in enumerate(scenes[:BASE_PROMPTS])]
    return Drawn(scenes, with_adapter, without)


@pytest.fixture(scope="module")
def judge():
    from sa_inject.demo.base.judge import Judge

    return Judge()


def test_the_adapter_draws_the_subject_and_the_base_model_cannot(drawn, judge):
    with_adapter, without = ranks(judge, drawn.adapter), ranks(judge, drawn.base)
    assert np.median(with_adapter) < PLACES, f"places of the robot among all objects: {with_adapter}"
    assert np.median(without) > 2 * np.median(with_adapter), f"without the adapter: {without}"


def test_a_judge_trained_by_others_finds_the_adapters_pictures_more_alike(drawn):
    """ImageNet features: both draw the same prompts, and the real scenes of these are known."""
    from sa_inject.demo.base import imagenet
    from sa_inject.demo.base.scenes import render

    judge = embedder(imagenet)
    real = judge.embed([render(scene) for scene in drawn.scenes[:BASE_PROMPTS]])
    with_adapter, without = (
        (judge.embed(images[:BASE_PROMPTS]) * real).sum(dim=1) for images in (drawn.adapter, drawn.base)
    )
    assert with_adapter.mean() > without.mean() + 0.03, f"{with_adapter.tolist()}, without {without.tolist()}"


def test_the_adapter_leaves_the_background_to_the_prompt(drawn):
    from sa_inject.demo.base.judge import measure

    right = [measure(image).colour == scene.colour for image, scene in zip(drawn.adapter, drawn.scenes, strict=True)]
    assert np.mean(right) >= 0.8, f"right in {sum(right)} of {len(right)}"


def demo_run() -> Any:
    """The demo's script, which is run by path and imports its neighbours as `demo`."""
    import importlib.util
    import sys

    import sa_inject.demo

    path = Path(sa_inject.demo.__file__ or "").with_name("run.py")
    spec = importlib.util.spec_from_file_location("sa_inject_demo_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "demo", sa_inject.demo)
        spec.loader.exec_module(module)
    return module


def load(checkpoint: Path) -> tuple[Any, Any, Any]:
    import comfy.sd
    import folder_paths

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), embedding_directory=folder_paths.get_folder_paths("embeddings")
        )[:3]


def new_scenes(count: int) -> list[Any]:
    """Scenes that no reference picture shows; half of them before colours that none has."""
    from sa_inject.demo.base.artwork import find
    from sa_inject.demo.base.scenes import COLOURS, Scene
    from sa_inject.demo.subjects.draw import SCENES

    rng = np.random.RandomState(5)
    scenes: list[Any] = []
    while len(scenes) < count:
        new = ("red", "cyan", "purple")
        colours = new if len(scenes) % 2 else tuple(COLOURS)
        factors = (
            ("small", "large")[rng.randint(2)],
            ("left", "right")[rng.randint(2)],
            colours[rng.randint(len(colours))],
            "plain",
        )
        if factors not in SCENES:
            scenes.append(Scene(find("robot"), *factors))
    return scenes


def ranks(judge: Any, images: list[Image.Image]) -> list[int]:
    """The robot's place among all artwork for each picture, from 0."""
    from sa_inject.demo.base.artwork import find

    return [order.index(find("robot")) for order in judge.rank(images)]


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255


def picture(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().byte().cpu().numpy())
