"""Preview pictures of an adapter, drawn with ComfyUI's sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import comfy.sample
import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.image_prompt import ImagePrompt
from ....core.schedule import DEFAULT_STRENGTH, REFERENCE_START
from ....trainer.captions import TEMPLATES, subject_phrase
from ..images import decode_latents
from ..networks.registry import is_distilled
from ..text import clip_with_token
from .patched_model import patch_model
from .sampling_run import Injection

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

STEPS = 20
GUIDANCE = 4.0
SAMPLER, SCHEDULER = "euler_ancestral", "normal"  # as in the workflows; with noise at each step


def draw_previews(
    model: ModelPatcher, clip: CLIP, vae: VAE, adapter: Adapter, prompt: ImagePrompt, count: int, seed: int
) -> Tensor:
    """Draw the subject `count` times at the size of its first image prompt. -> IMAGE (count, h, w, 3)"""
    text = TEMPLATES[0].format(subject_phrase(adapter.info.placeholder_token, adapter.info.class_word))
    return _draw(model, SampleTexts(clip), vae, adapter, prompt, text, count, seed)


class SampleTexts:
    """The texts of samples, encoded again only where the word has changed.

    A frozen word does not: a large text encoder then need not be loaded for every sample, in the model's place.
    """

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip
        self._word: dict[str, Tensor] = {}
        self._known: dict[str, Any] = {}

    def encode(self, adapter: Adapter, text: str) -> Any:
        """-> CONDITIONING"""
        word = adapter.token_embedding
        if word.keys() != self._word.keys() or not all(torch.equal(word[name], self._word[name]) for name in word):
            self._word = {name: vectors.clone() for name, vectors in word.items()}
            self._known.clear()
        if text not in self._known:
            clip = clip_with_token(self._clip, adapter.info.placeholder_token, word)
            self._known[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return self._known[text]


def draw_samples(
    model: ModelPatcher,
    encoded: SampleTexts,
    vae: VAE,
    adapter: Adapter,
    prompt: ImagePrompt,
    texts: Sequence[str],
    seed: int,
) -> Tensor:
    """Draw each text once, with the same noise. Torch's global generator is not changed. -> IMAGE (texts, h, w, 3)"""
    with torch.random.fork_rng():
        return torch.cat([_draw(model, encoded, vae, adapter, prompt, text, 1, seed) for text in texts])


def sample_texts(prompts: Sequence[str], placeholder_token: str, class_word: str) -> list[str]:
    """The prompts of samples: the user's, with the placeholder token for [trigger], or else a template."""
    if not prompts:
        return [TEMPLATES[0].format(subject_phrase(placeholder_token, class_word))]
    return [prompt.replace("[trigger]", placeholder_token) for prompt in prompts]


def _draw(
    model: ModelPatcher,
    encoded: SampleTexts,
    vae: VAE,
    adapter: Adapter,
    prompt: ImagePrompt,
    text: str,
    count: int,
    seed: int,
) -> Tensor:
    positive, negative = (encoded.encode(adapter, words) for words in (text, ""))
    patched = patch_model(model, default_injection(adapter, prompt))
    latent = torch.zeros(count, *prompt.pictures[0].latent.shape[1:])
    noise = comfy.sample.prepare_noise(latent, seed)
    guidance = 1.0 if is_distilled(model.model) else GUIDANCE
    samples = comfy.sample.sample(
        patched, noise, STEPS, guidance, SAMPLER, SCHEDULER, positive, negative, latent, disable_pbar=True, seed=seed
    )
    return decode_latents(vae, samples)


def default_injection(adapter: Adapter, prompt: ImagePrompt) -> Injection:
    """The injection of an Apply node with default settings."""
    return Injection(
        adapter=adapter,
        image_prompt=prompt,
        strength=DEFAULT_STRENGTH,
        start_percent=REFERENCE_START,
        end_percent=1.0,
        apply_to="positive",
        blocks=frozenset(adapter.blocks()),
        attn_mask=None,
    )
