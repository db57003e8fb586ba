"""The pool pairs each scene's latent with its caption, and is made once."""

import numpy as np
import pytest
import torch

from sa_inject.demo.base.artwork import objects
from sa_inject.demo.base.scenes import random_scene, render

pytestmark = [pytest.mark.comfy, pytest.mark.usefixtures("artwork")]

COUNT, IMAGE_SIZE = 150, 32  # not a whole number of batches


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import pool

    return pool


@pytest.fixture(scope="module")
def make(module, autoencoder_file, tmp_path_factory):
    """`make(name, seed=...)` for the pool in that file of a folder that the tests of this module share."""
    folder = tmp_path_factory.mktemp("pool")

    def make(name: str, *, count: int = COUNT, seed: int = 1, autoencoder=autoencoder_file):
        settings = {"image_size": IMAGE_SIZE, "count": count, "seed": seed, "device": "cpu"}
        return module.make_pool(folder / name, autoencoder, **settings)

    return make


def test_a_pool_has_a_latent_and_a_caption_for_each_scene(make):
    pool = make("pool.pt")
    assert pool.latents.shape == (COUNT, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    assert pool.latents.dtype == torch.float16 and len(pool.captions) == COUNT


def test_a_latent_and_its_caption_are_of_the_same_scene(make, autoencoder_file):
    from sa_inject.demo.base.autoencoder import encode, load_autoencoder

    pool = make("pool.pt")
    rng = np.random.RandomState(1)
    scenes = [random_scene(rng) for _ in range(16)]  # the first batch, which is drawn before all else
    latents = encode(load_autoencoder(autoencoder_file), [render(scene, IMAGE_SIZE) for scene in scenes])
    assert torch.allclose(pool.latents[:16].float(), latents, rtol=2e-3, atol=2e-3)
    for scene, caption in zip(scenes, pool.captions[:16], strict=True):
        words = {scene.size, scene.side, scene.colour, scene.pattern} - {"plain"}
        assert all(word in caption for word in words)
        assert scene.artwork.word in caption or scene.artwork.class_word in caption


def test_captions_name_base_objects_and_one_in_ten_its_class(module, make):
    names = {artwork.word for artwork in objects("base")}
    classes = {artwork.class_word for artwork in objects("base")}

    def mentions(caption: str, words: set[str]) -> bool:
        return any(f" {word} " in f" {caption.replace(',', ' ')} " for word in words)

    captions = make("pool.pt").captions
    named = [mentions(caption, names) for caption in captions]
    assert all(is_named or mentions(caption, classes) for is_named, caption in zip(named, captions, strict=True))
    assert 1 - np.mean(named) == pytest.approx(module.CLASS_WORD_SHARE, abs=0.06)


def test_a_pool_that_is_there_is_not_made_again(make, tmp_path):
    first = make("pool.pt")
    again = make("pool.pt", count=5, seed=2, autoencoder=tmp_path / "none.pt")
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions


def test_the_seed_decides_what_is_in_a_pool(make):
    first, again, other = make("first.pt", count=20), make("again.pt", count=20), make("other.pt", count=20, seed=2)
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions
    assert not torch.equal(first.latents, other.latents) and first.captions != other.captions


def test_a_pool_that_is_too_small_is_gone_on_with(module, make, monkeypatch):
    """What is there stays, up to the last whole chunk, and what comes is what a pool of that size has."""
    whole = make("whole.pt", count=50)
    make("grown.pt", count=20)
    encoded: list[int] = []
    encode = module.encode
    monkeypatch.setattr(
        module,
        "encode",
        lambda model, pictures, device: encoded.append(len(pictures)) or encode(model, pictures, device),
    )
    grown = make("grown.pt", count=50)
    assert torch.equal(grown.latents, whole.latents) and grown.captions == whole.captions
    assert encoded == [16, 16, 2]
