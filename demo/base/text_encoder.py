"""The base model's text encoder: CLIP-L's shape, from a seed and never trained, so that it need not be shipped.

Only the first of its twelve layers has an effect. The residual branches of the others are zero. So the output at each
position depends mostly on its own word, and captions are cheap to encode in training. The scales follow the real
CLIP-L, so that learning rates for a token embedding can be compared.
"""

import numpy as np
import torch
from torch import Tensor

from .host import use_host
from .precision import fast

use_host("cuda" if torch.cuda.is_available() else "cpu")
import comfy.sd1_clip  # noqa: E402

SEED: int = 20_260
WIDTH: int = 768
HIDDEN_STATES_KEY: int = 3072
LAYERS: int = 12
VOCABULARY: int = 49408
POSITIONS: int = 77
TOKEN_STD: float = 0.014
POSITION_STD: float = 0.005
BRANCH_STD: float = 0.01  # scale of a residual branch of the first layer, before attention averages it


def text_encoder_state_dict(seed: int = SEED) -> dict[str, Tensor]:
    """All tensors under `text_model.`, in float16. Numpy's legacy generator gives the same numbers everywhere."""
    rng = np.random.RandomState(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.from_numpy((rng.standard_normal(shape) * std).astype(np.float16))

    tensors = {
        "embeddings.token_embedding.weight": normal(VOCABULARY, WIDTH, std=TOKEN_STD),
        "embeddings.position_embedding.weight": normal(POSITIONS, WIDTH, std=POSITION_STD),
        "embeddings.position_ids": torch.arange(POSITIONS)[None],
    }
    for layer in range(LAYERS):
        prefix = f"encoder.layers.{layer}"
        branch = BRANCH_STD if layer == 0 else 0.0
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = normal(WIDTH, WIDTH, std=WIDTH**-0.5)
        tensors[f"{prefix}.self_attn.out_proj.weight"] = normal(WIDTH, WIDTH, std=branch * WIDTH**-0.5)
        tensors[f"{prefix}.mlp.fc1.weight"] = normal(HIDDEN_STATES_KEY, WIDTH, std=WIDTH**-0.5)
        tensors[f"{prefix}.mlp.fc2.weight"] = normal(WIDTH, HIDDEN_STATES_KEY, std=branch * HIDDEN_STATES_KEY**-0.5)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc2"):
            tensors[f"{prefix}.{name}.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
        tensors[f"{prefix}.mlp.fc1.bias"] = torch.zeros(HIDDEN_STATES_KEY, dtype=torch.float16)
        for name in ("layer_norm1", "layer_norm2"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(WIDTH, dtype=torch.float16)
            tensors[f"{prefix}.{name}.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
    tensors["final_layer_norm.weight"] = torch.ones(WIDTH, dtype=torch.float16)
    tensors["final_layer_norm.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
    return tensors


class CaptionEncoder:
    """Encodes captions for cross-attention, with a cache. Leaves out the layers without an effect."""

    def __init__(self, device: str = "cpu", seed: int = SEED):
        self._device = device
        self._tokenizer = comfy.sd1_clip.SD1Tokenizer()
        clip = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float32)
        self._model = clip.clip_l.transformer.text_model
        self._model.load_state_dict(
            {name: value.float() for name, value in text_encoder_state_dict(seed).items() if value.is_floating_point()},
            assign=True,
        )
        self._model.encoder.layers = self._model.encoder.layers[:1]
        self._model.requires_grad_(False).to(device)
        self._remembered: dict[str, Tensor] = {}

    def forget(self) -> None:
        self._remembered.clear()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Tensor:
        """-> (b, 77, 768) in bfloat16"""
        missing = sorted(set(captions) - self._remembered.keys())
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            tokens = [[token for token, _ in self._tokenizer.tokenize_with_weights(text)["l"][0]] for text in chunk]
            with fast(self._device):
                encoded = self._model(torch.tensor(tokens, device=self._device))[0]  # (b, 77, 768)
            self._remembered.update(zip(chunk, encoded.to(torch.bfloat16).unbind(), strict=True))
        return torch.stack([self._remembered[text] for text in captions])
