"""The tiny NextDiT's text encoder is the host's, and captions of any length form one batch."""

import pytest
import torch

pytestmark = pytest.mark.comfy

CAPTIONS = ["", "a small guitar on the left, striped red background", "guitar"]


@pytest.fixture(scope="module")
def module():
    from sa_inject.demo.base import language_model

    return language_model


@pytest.fixture(scope="module")
def encode(module):
    return module.CaptionEncoder()


def test_the_seed_decides_the_vectors(module, encode):
    again, other = module.CaptionEncoder(), module.CaptionEncoder(seed=1)
    assert torch.equal(encode(CAPTIONS).vectors, again(CAPTIONS).vectors)
    assert not torch.allclose(encode(CAPTIONS).vectors, other(CAPTIONS).vectors, atol=1e-3)


def test_a_batch_holds_every_caption_at_its_own_length_and_zeros_behind(module, encode):
    texts = encode(CAPTIONS)
    assert texts.vectors.shape == (3, module.MULTIPLE, module.WIDTH)
    assert texts.lengths[1] > texts.lengths[2] > texts.lengths[0] > 0
    for row, caption in enumerate(CAPTIONS):
        own, length = encode([caption]), int(texts.lengths[row])
        assert torch.equal(texts.vectors[row, :length], own.vectors[0, :length])
        assert not texts.vectors[row, length:].any()


def test_a_long_caption_is_filled_up_to_the_next_multiple(module, encode):
    texts = encode(["a guitar and " * 20, "a guitar"])
    assert texts.vectors.shape[1] % module.MULTIPLE == 0 and texts.vectors.shape[1] > module.MULTIPLE
    joined = texts.joined(encode(["a guitar"]).repeated(2))
    assert joined.vectors.shape == (4, texts.vectors.shape[1], module.WIDTH)
    assert torch.equal(joined.vectors[2], texts.vectors[1]) and joined.lengths[2] == texts.lengths[1]


def test_other_words_have_other_vectors_and_a_word_keeps_most_of_its_own(encode):
    small, large = (encode([f"a {size} guitar on the left"]) for size in ("small", "large"))
    assert torch.equal(small.lengths, large.lengths)
    n = int(small.lengths[0])
    likeness = torch.cosine_similarity(small.vectors[0, :n], large.vectors[0, :n], dim=-1)
    assert (likeness < 0.5).sum() == 1  # the word that was changed
    assert (likeness > 0.9).sum() == n - 1
