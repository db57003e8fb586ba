"""The learned word inside the host's text encoders: found where it is meant, and changing nothing else."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.adapters import make_adapter, random
from tests.host.learned_words import encoder_of_prompts, same, vectors, with_token


@pytest.fixture(scope="module")
def sdxl(load_checkpoint):
    return load_checkpoint("sdxl")


@pytest.fixture(scope="module")
def encode(comfy_host):
    return encoder_of_prompts(comfy_host)


@pytest.fixture(scope="module")
def write_embedding(load_checkpoint, pack_nodes):
    """`write_embedding(name, tokens)` as the Load node writes it."""
    from sa_inject.nodes.host.embeddings import save_embedding

    adapter = make_adapter(load_checkpoint("sd15")[0])

    def write(name: str, tokens: dict[str, Tensor]) -> None:
        save_embedding(dataclasses.replace(adapter, token_embedding=tokens), name)

    return write


@pytest.fixture(scope="module")
def patched_clip(sd15_clip, write_embedding):
    """A CLIP that reads `sainj` as the vector that is also the embedding `word`."""
    write_embedding("word", vectors())
    return with_token(sd15_clip, vectors())


# --- where the word is found ------------------------------------------------------------------------------------------


SAME_READING = [
    ("sainj", "embedding:word"),
    ("a photo of sainj toy", "a photo of embedding:word toy"),
    ("a photo of SaInJ toy", "a photo of embedding:word toy"),
    ("a photo of sainj, on grass", "a photo of embedding:word, on grass"),
    ("red,sainj,blue", "red, embedding:word ,blue"),
    ("red\nsainj\nblue", "red\nembedding:word\nblue"),
    ("sainj's hat, a 'sainj'!", "embedding:word 's hat, a ' embedding:word '!"),
    ("sainj sainj and sainj", "embedding:word embedding:word and embedding:word"),
    ("(sainj:1.3) on grass", "(embedding:word:1.3) on grass"),
    ("a ((sainj toy)), (red:0.5)", "a ((embedding:word toy)), (red:0.5)"),
    ("sainj " + "very " * 90 + "old sainj", "embedding:word " + "very " * 90 + "old embedding:word"),
]


def test_placeholder_reads_as_its_embedding_file_does(encode, patched_clip, sd15_clip):
    for prompt, stock in SAME_READING:
        found = encode(patched_clip, prompt)
        assert same(found, encode(sd15_clip, stock)), prompt
        assert not torch.allclose(found[0], encode(sd15_clip, prompt)[0], atol=1e-3), prompt


def test_weight_of_the_placeholder_counts(encode, patched_clip):
    conds = [encode(patched_clip, f"a photo of (sainj:{weight})")[0] for weight in (1.0, 1.3, 1.6)]
    assert not torch.allclose(conds[0], conds[1], atol=1e-3) and not torch.allclose(conds[1], conds[2], atol=1e-3)


def test_other_prompts_are_read_as_before(encode, patched_clip, sd15_clip):
    for prompt in ("", "a photo of a toy", "sainjs", "mysainj", "sainj2", "unsainjé", "sain j"):
        assert same(encode(patched_clip, prompt), encode(sd15_clip, prompt)), prompt


def test_embedding_files_named_like_the_word_stay_reachable(encode, patched_clip, sd15_clip, write_embedding):
    write_embedding("sainj", vectors(seed=7))
    write_embedding("my-sainj", vectors(seed=8))
    for prompt in ("embedding:sainj", "a (embedding:sainj:1.2) toy", "a embedding:my-sainj, red"):
        assert same(encode(patched_clip, prompt), encode(sd15_clip, prompt)), prompt


def test_given_clip_stays_as_it_was(encode, sd15_clip):
    prompt = "a photo of sainj toy"
    tokenizer, attributes = sd15_clip.tokenizer, dict(vars(sd15_clip.tokenizer.clip_l))
    before = encode(sd15_clip, prompt)
    weights = {name: tensor.clone() for name, tensor in sd15_clip.cond_stage_model.state_dict().items()}
    assert not torch.equal(encode(with_token(sd15_clip, vectors()), prompt)[0], before[0])
    assert sd15_clip.tokenizer is tokenizer and vars(tokenizer.clip_l) == attributes
    assert all(torch.equal(weights[name], now) for name, now in sd15_clip.cond_stage_model.state_dict().items())
    assert same(encode(sd15_clip, prompt), before)


def test_clip_skip_before_and_after_teaching(encode, comfy_host, sd15_clip, patched_clip):
    def skipped(clip):
        return comfy_host.execute("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2)[0]

    expected = encode(skipped(sd15_clip), "a photo of embedding:word toy")
    assert not torch.equal(encode(patched_clip, "a photo of sainj toy")[0], expected[0])
    assert same(encode(skipped(patched_clip), "a photo of sainj toy"), expected)
    assert same(encode(with_token(skipped(sd15_clip), vectors()), "a photo of sainj toy"), expected)


def test_word_of_several_vectors(encode, sd15_clip, write_embedding):
    write_embedding("several", vectors(seed=3, count=3))
    patched_clip = with_token(sd15_clip, vectors(seed=3, count=3))
    assert same(encode(patched_clip, "my sainj toy"), encode(sd15_clip, "my embedding:several toy"))


def test_clip_without_an_embeddings_folder_learns_too(encode, sd15_clip, patched_clip):
    import copy

    bare = sd15_clip.clone()
    bare.tokenizer = copy.copy(bare.tokenizer)
    bare.tokenizer.clip_l = copy.copy(bare.tokenizer.clip_l)
    bare.tokenizer.clip_l.embedding_directory = None
    assert same(encode(with_token(bare, vectors()), "my sainj"), encode(patched_clip, "my sainj"))


# --- several words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["wubbo", "sainj-2", "inject", "token"])
def test_two_adapters_share_a_clip(encode, patched_clip, sd15_clip, write_embedding, second):
    write_embedding("second", vectors(seed=5))
    other_way = with_token(with_token(sd15_clip, vectors(seed=5), second), vectors())
    expected = encode(sd15_clip, "embedding:word beside embedding:second")
    for both in (with_token(patched_clip, vectors(seed=5), second), other_way):
        assert same(encode(both, f"sainj beside {second}"), expected)
    assert same(encode(patched_clip, "sainj alone"), encode(sd15_clip, "embedding:word alone"))


@pytest.mark.parametrize("spelling", ["sainj", "SAINJ"])
def test_of_two_adapters_with_one_word_the_later_counts(encode, patched_clip, sd15_clip, write_embedding, spelling):
    write_embedding("second", vectors(seed=5))
    later = with_token(patched_clip, vectors(seed=5), spelling)
    assert same(encode(later, "my sainj"), encode(sd15_clip, "my embedding:second"))


def test_clones_of_a_taught_clip_know_the_word(encode, patched_clip):
    assert same(encode(patched_clip.clone(), "my sainj"), encode(patched_clip, "my sainj"))
    assert patched_clip.clone().tokenizer.clip_l.max_length == 77


# --- other text encoders ----------------------------------------------------------------------------------------------


def test_both_encoders_of_sdxl_read_the_word(encode, sdxl, write_embedding):
    clip, tokens = sdxl[1], vectors("clip_l", "clip_g")
    write_embedding("both", tokens)
    patched_clip = with_token(clip, tokens)
    found, base = encode(patched_clip, "my (sainj:1.2) toy"), encode(clip, "my (sainj:1.2) toy")
    assert same(found, encode(clip, "my (embedding:both:1.2) toy"))
    assert not torch.allclose(found[0][..., :768], base[0][..., :768], atol=1e-3)
    assert not torch.allclose(found[0][..., 768:], base[0][..., 768:], atol=1e-3)
    assert not torch.allclose(found[1], base[1], atol=1e-3)

    sizes = dict.fromkeys(("width", "height", "target_width", "target_height"), 64) | {"crop_w": 0, "crop_h": 0}
    texts = [{"text_g": f"a {word}", "text_l": f"{word} toy"} for word in ("sainj", "embedding:both")]
    taught_way, stock_way = (
        encode(which, "", "CLIPTextEncodeSDXL", **text, **sizes)
        for which, text in zip((patched_clip, clip), texts, strict=True)
    )
    assert same(taught_way, stock_way)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_clip_of_another_family_is_refused(load_checkpoint, kind):
    encoders = {"sd2": "clip_h", "sdxl": "clip_l, clip_g"}[kind]
    with pytest.raises(ValueError, match=f"'sainj' was trained for clip_l, but .* has {encoders}. Connect the CLIP of"):
        with_token(load_checkpoint(kind)[1], vectors())


def test_word_for_more_encoders_than_the_clip_has_is_refused(sd15_clip):
    with pytest.raises(ValueError, match="'sainj' was trained for clip_l, clip_g, but the connected CLIP has clip_l. "):
        with_token(sd15_clip, {"clip_l": random(1, 768), "clip_g": random(1, 1280)})


def test_clip_of_another_width_is_refused(sd15_clip):
    with pytest.raises(
        ValueError, match="'sainj' has embedding size 1024 for clip_l, but .* expects 768. Connect the CLIP of"
    ):
        with_token(sd15_clip, {"clip_l": random(1, 1024)})


def test_text_encoder_without_a_clip_is_refused():
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        with_token(SimpleNamespace(tokenizer=SimpleNamespace()), vectors())


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [None, -2])
def test_gradients_reach_the_word(sd15_clip, layer):
    for prompt in ("a photo of sainj toy", "a (sainj:1.3) toy", "sainj " + "very " * 90):
        assert_gradients_reach(sd15_clip, vectors(), prompt, layer)


def test_gradients_reach_the_word_in_both_encoders_of_sdxl(sdxl):
    assert_gradients_reach(sdxl[1], vectors("clip_l", "clip_g"), "a photo of sainj toy", None)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_of_the_word_in_bfloat16_are_those_in_float32_but_for_rounding(sd15_clip, recompute):
    exact = gradient_of_the_word(sd15_clip, recompute, torch.float32)
    rounded = gradient_of_the_word(sd15_clip, recompute, torch.bfloat16)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


def gradient_of_the_word(clip: Any, recompute: bool, dtype: torch.dtype) -> Tensor:
    import comfy.model_management as model_management

    from sa_inject.nodes.host.learning.autograd import make_differentiable, out_of_place_text_encoder, training_mode
    from sa_inject.nodes.host.text import encode_text

    with torch.inference_mode(), training_mode():
        word = torch.nn.Parameter(vectors()["clip_l"].clone())
        model_management.load_models_gpu([clip.patcher])
        make_differentiable(clip.cond_stage_model)
        with out_of_place_text_encoder(clip, recompute, dtype):
            encoded = encode_text(with_token(clip, {"clip_l": word}), ["a photo of sainj toy"]).cross_attn
            assert encoded.dtype == torch.float32
            encoded.square().sum().backward()
    return word.grad


def assert_gradients_reach(clip: Any, tokens: dict[str, Tensor], prompt: str, layer: int | None) -> None:
    import comfy.model_management as model_management

    from sa_inject.nodes.host.learning.autograd import make_differentiable, out_of_place_text_encoder, training_mode
    from sa_inject.nodes.host.text import encode_text

    with torch.inference_mode(), training_mode():  # as in a node
        learned = {name: torch.nn.Parameter(vector.clone()) for name, vector in tokens.items()}
        patched_clip = with_token(clip, learned)
        patched_clip.clip_layer(layer)
        model_management.load_models_gpu([clip.patcher])
        make_differentiable(clip.cond_stage_model)
        expected = encode_text(patched_clip, [prompt])
        with out_of_place_text_encoder(clip, checkpointing=layer is None):
            text = encode_text(patched_clip, [prompt, "a dog"])
            text.cross_attn.square().sum().backward()
        assert torch.allclose(text.cross_attn[:1], expected.cross_attn, atol=1e-5)
        assert text.cross_attn.shape[1] == expected.cross_attn.shape[1]  # the short prompt is repeated to the length
    for vector in learned.values():
        assert vector.grad is not None and vector.grad.isfinite().all() and vector.grad.norm() > 0
    assert [name for name, weight in clip.cond_stage_model.named_parameters() if weight.grad is not None] == []
    assert [m for m in clip.cond_stage_model.modules() if "forward" in vars(m)] == []


TEXTS = ("a photo of sainj toy", "a (sainj:1.3) toy", "", "a dog")


@pytest.mark.parametrize("texts", [TEXTS, (*TEXTS, "sainj " + "very " * 90), ("sainj " + "very " * 90,) * 2])
def test_texts_that_are_encoded_together_come_out_as_they_do_alone(sd15_clip, texts):
    assert_together_as_alone(with_token(sd15_clip, vectors()), texts, pooled_width=768)


@torch.inference_mode()
def test_word_of_several_tokens_begins_as_their_mean(sdxl):
    """In both encoders, each with its own vocabulary's vectors."""
    from sa_inject.nodes.host.text import initial_token_embedding

    clip = sdxl[1]
    found = initial_token_embedding(clip, "teddy bear plushie", 2)
    assert found.keys() == {"clip_l", "clip_g"}
    for name, initial in found.items():
        ids = clip.tokenize("teddy bear plushie")[name.removeprefix("clip_")][0][1:]
        words = list(itertools.takewhile(lambda token: token != 49407, (token for token, _ in ids)))
        assert len(words) > 2
        table = getattr(clip.cond_stage_model, name).transformer.text_model.embeddings.token_embedding.weight
        assert torch.allclose(initial, table[words].float().mean(0).expand(2, -1), atol=1e-6)


def test_texts_that_sdxl_encodes_together_keep_their_pooled_vectors(sdxl):
    assert_together_as_alone(with_token(sdxl[1], vectors("clip_l", "clip_g")), TEXTS, pooled_width=1280)


@torch.inference_mode()
def assert_together_as_alone(clip: Any, texts: tuple[str, ...], pooled_width: int) -> None:
    from sa_inject.nodes.host.text import encode_text

    together = encode_text(clip, texts)
    assert together.pooled.shape == (len(texts), pooled_width)
    for row, text in enumerate(texts):
        alone = encode_text(clip, [text])
        repeats = together.cross_attn.shape[1] // alone.cross_attn.shape[1]
        assert torch.allclose(together.cross_attn[row], alone.cross_attn[0].repeat(repeats, 1), atol=1e-5)
        assert torch.allclose(together.pooled[row], alone.pooled[0], atol=1e-5)
