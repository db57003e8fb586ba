"""The learned word inside the language models that diffusion transformers read texts with: Qwen3 and T5.

A word whose vectors are those of an ordinary word has to read as that word does, bit for bit. So the template with its
line breaks, the blanks around the word, weights and padding all stay.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.host.tiny_transformers import knows_klein, tiny_clip

KINDS = ("z_image", "flux", "chroma", "klein")
ORDINARY = "dog"  # one token in all of these vocabularies


@pytest.fixture(scope="module", params=KINDS)
def clip(request, comfy_host):
    if request.param == "klein" and not knows_klein():
        pytest.skip("this ComfyUI has no text encoder for Flux.2 Klein")
    return tiny_clip(request.param)


def vectors_of(clip: Any, word: str = ORDINARY, count: int = 1) -> dict[str, Tensor]:
    from sa_inject.nodes.host.text import initial_token_embedding

    with torch.inference_mode():
        return initial_token_embedding(clip, word, count)


def with_token(clip: Any, tokens: dict[str, Tensor], word: str = "sainj") -> Any:
    from sa_inject.nodes.host.text import clip_with_token

    return clip_with_token(clip, word, tokens)


PROMPTS = (
    "a photo of a {} in the snow",
    "{}",
    "{} and a {} beside another {}",
    "a photo of\na {}\n\non grass",
    "a {}",
    "a {}, in the snow. A {}, a {}!",
    "a {}'s hat; the {}\"",
    "a {}:\na {}.",
)


def test_word_with_an_ordinary_words_vector_reads_as_that_word(clip):
    patched_clip = with_token(clip, vectors_of(clip))
    for prompt in PROMPTS:
        cond, pooled = encode_any(patched_clip, prompt.format(*["sainj"] * 3))
        expected, expected_pooled = encode_any(clip, prompt.format(*[ORDINARY] * 3))
        plain, _ = encode_any(clip, prompt.format(*["sainj"] * 3))
        # The first of a text has no blank before it, and is another token in some vocabularies.
        same = cond.shape == expected.shape and torch.equal(cond, expected)
        assert same or prompt.startswith("{"), prompt
        assert cond.shape != plain.shape or not torch.allclose(cond, plain, atol=1e-3), prompt
        assert pooled is None or torch.equal(pooled, expected_pooled), prompt


def encode_any(clip: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
    tokens = clip.tokenize(prompt)
    with torch.inference_mode():
        ((cond, options),) = clip.encode_from_tokens_scheduled(tokens)
    return cond, options.get("pooled_output")


def test_weights_count_where_the_encoder_knows_them(comfy_host):
    clip = tiny_clip("flux")
    patched_clip = with_token(clip, vectors_of(clip))
    cond, _ = encode_any(patched_clip, "a (sainj:1.4) on grass")
    expected, _ = encode_any(clip, "a (dog:1.4) on grass")
    assert torch.equal(cond, expected)
    assert not torch.allclose(cond, encode_any(patched_clip, "a sainj on grass")[0], atol=1e-4)


def test_line_breaks_of_the_template_stay(comfy_host):
    clip = tiny_clip("z_image")
    patched_clip = with_token(clip, vectors_of(clip, count=3))
    with_word = [token for token, _ in patched_clip.tokenize("a sainj")["qwen3_4b"][0]]
    stock = [token for token, _ in clip.tokenize("a dog")["qwen3_4b"][0]]
    place = next(at for at, token in enumerate(with_word) if isinstance(token, Tensor))
    assert with_word[:place] == stock[:place] and with_word[place + 3 :] == stock[place + 1 :]
    assert stock.count(clip.tokenizer.qwen3_4b.tokenizer("\n")["input_ids"][0]) == 3


def test_word_of_several_vectors_takes_the_place_of_padding(comfy_host):
    clip = tiny_clip("flux")
    for count in (1, 4):
        (chunk,) = with_token(clip, vectors_of(clip, count=count)).tokenize("a photo of sainj")["t5xxl"]
        assert len(chunk) == 256 and sum(isinstance(token, Tensor) for token, _ in chunk) == count


def test_two_words_share_one_clip(clip):
    one, two = vectors_of(clip, "dog"), vectors_of(clip, "cat")
    patched_clip = with_token(with_token(clip, one, "sainj"), two, "zorblax")
    found, _ = encode_any(patched_clip, "a sainj and a zorblax and a sainj")
    assert torch.equal(found, encode_any(clip, "a dog and a cat and a dog")[0])


def test_other_prompts_and_the_given_clip_stay(clip):
    before = {name: vars(inner).copy() for name, inner in vars(clip.tokenizer).items() if hasattr(inner, "tokenizer")}
    patched_clip = with_token(clip, vectors_of(clip))
    for prompt in ("", "a dog", "mysainj", "\ue0007\ue000", " embedding:sa-inject-token-7 "):
        assert torch.equal(encode_any(patched_clip, prompt)[0], encode_any(clip, prompt)[0]), prompt
    assert {name: vars(getattr(clip.tokenizer, name)) for name in before} == before


def test_vectors_of_another_width_are_refused(clip):
    wrong = {name: vector.repeat(1, 2) for name, vector in vectors_of(clip).items()}
    with pytest.raises(ValueError, match="has embedding size .* Connect the CLIP of the adapter's base model"):
        with_token(clip, wrong)


def test_ordinary_words_are_no_placeholder(clip):
    from sa_inject.nodes.host.text import check_placeholder_token

    check_placeholder_token(clip, "sainj")
    with pytest.raises(ValueError, match="an ordinary word of the text encoder's vocabulary"):
        check_placeholder_token(clip, "dog")


def test_texts_of_different_length_are_filled_up_and_never_repeated(clip):
    from sa_inject.nodes.host.text import encode_text

    texts = ["a dog", "a photo of a dog in the snow", "a cat"]
    with torch.inference_mode():
        together = encode_text(clip, texts)
        alone = [encode_text(clip, [text]) for text in texts]
    assert together.lengths == tuple(text.cross_attn.shape[1] for text in alone)
    assert sorted(place for places in together.by_length() for place in places) == [0, 1, 2]
    for places in together.by_length():
        assert together.take(places).cross_attn.shape[1] == together.lengths[places[0]]
    for row, text in enumerate(alone):
        assert torch.allclose(together.take([row]).cross_attn, text.cross_attn, atol=1e-5)
        assert text.pooled is None or torch.allclose(together.take([row]).pooled, text.pooled, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_the_word_is_that_of_a_finite_difference(clip, checkpointing):
    import comfy.model_management as model_management

    from sa_inject.nodes.host.learning.autograd import make_differentiable, out_of_place_text_encoder, training_mode
    from sa_inject.nodes.host.text import encode_text

    vectors = vectors_of(clip, count=2)
    prompts = ["a photo of sainj dog", "sainj", "two sainj dogs"]
    with torch.inference_mode(), training_mode():  # as in a node
        model_management.load_models_gpu([clip.patcher])
        make_differentiable(clip.cond_stage_model)
        word = {name: torch.nn.Parameter(vector.clone()) for name, vector in vectors.items()}
        generator = torch.Generator().manual_seed(4)
        direction = {name: torch.randn(vector.shape, generator=generator) for name, vector in word.items()}

        def encoded(step: float) -> Tensor:
            moved = {name: vector + step * direction[name] for name, vector in word.items()}
            text = encode_text(with_token(clip, moved), prompts)
            return torch.cat([part.double().flatten() for part in text[:2] if part is not None])

        with torch.no_grad():
            stock = encoded(0.0)
        with out_of_place_text_encoder(clip, checkpointing):
            found = encoded(0.0)
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            (found * weights).sum().backward()
        assert torch.equal(found.detach(), stock)
        with torch.no_grad():
            difference = ((encoded(2e-3) - encoded(-2e-3)) * weights).sum() / 4e-3
    assert all(vector.grad is not None for vector in word.values())
    slope = sum((vector.grad.double() * direction[name]).sum() for name, vector in word.items())
    assert slope == pytest.approx(difference.item(), rel=2e-2)
    assert [name for name, weight in clip.cond_stage_model.named_parameters() if weight.grad is not None] == []
    assert [module for module in clip.cond_stage_model.modules() if "forward" in vars(module)] == []


def test_layers_are_as_they_were_after_an_error(clip):
    from sa_inject.nodes.host.learning.autograd import out_of_place_text_encoder

    with pytest.raises(KeyboardInterrupt), out_of_place_text_encoder(clip, True):
        assert [module for module in clip.cond_stage_model.modules() if "forward" in vars(module)]
        raise KeyboardInterrupt
    assert [module for module in clip.cond_stage_model.modules() if "forward" in vars(module)] == []
