"""The tiny NextDiT as the bench's base model, and ours on it with one choice changed at a time.

What is decided here is what no UNet can decide. Where do a reference's keys stand relative to the picture? Does the
LoRA act before or behind the key norm? At which noise level is a reference read?

Import only once the host is started.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.base import language_model, nextdit, weights
from sa_inject.core.kv import KV
from sa_inject.core.positions import POSITION_RULES
from sa_inject.core.reference import KVRecorder
from sa_inject.core.site import Site

from .ablations import CLEAN_SIGMA, HOST, drawn_with, sigma_at
from .adapted import RECORDER, Replacements, replaced
from .methods import METHODS as UNET_METHODS
from .methods import base_model, ours, ours_noised, peft_lora, textual_inversion
from .task import Method, TrainedModel, TrainingTask

POSITIONS = (f"{HOST}.learning.training.positions",)
READ_AT = (0.1, 0.5, 0.75)  # shares of the schedule; as it is, a quarter


def nextdit_models(state: Path) -> tuple[Any, Any, Any, str]:
    """MODEL, CLIP and VAE around what a training run has averaged, and what tells this network from others."""
    import comfy.sd

    network = nextdit.load_nextdit(state)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():  # as a stock loader makes them
        model = nextdit.as_model(network, device)
        clip = language_model.new_text_encoder(device)
        vae = comfy.sd.VAE(sd=weights.read_parts()[1])
    digest = hashlib.sha256()
    for weight in network.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    return model, clip, vae, digest.hexdigest()[:16]


class KeysBeforeNorm(KVRecorder):
    """The LoRA acts on what the key norm reads: R(norm((W_k + dW_k) z)) in place of R(norm(W_k z) + dW_k z)."""

    network: Any

    def project_keys_values(self, site: Site) -> KV:
        projected = super().project_keys_values(site)
        attention = getattr(self.network, site.key.stage)[site.key.index].attention
        k = frozen_keys(attention, site.hidden) + self._deltas[site.key, "to_k"](site.hidden)
        normed = attention.k_norm(k.unflatten(-1, (site.heads, -1))).flatten(2).to(k)
        return projected._replace(k=site.placed(normed, self._positions))


def frozen_keys(attention: Any, hidden: Tensor | None) -> Tensor:
    """What the fused projection makes of hidden states, its middle third. -> (b, m, heads*d)"""
    return attention.qkv(hidden).chunk(3, dim=-1)[1]


def with_rates(*rates: float) -> tuple[tuple[float, float], ...]:
    """Each rate with each rate of the word. A language model's vectors are longer than CLIP's."""
    return tuple((rate, word) for word in (1e-3, 3e-3, 1e-2) for rate in rates)


METHODS: dict[str, Method] = {
    "base": Method(base_model),
    "textual inversion": UNET_METHODS["textual inversion"],
    "PEFT LoRA": Method(peft_lora, with_rates(3e-4, 1e-3, 3e-3)),
    "ours, clean": Method(ours, with_rates(1e-4, 3e-4, 1e-3, 3e-3)),
    "ours, noised": Method(ours_noised, swept_as="ours, clean"),
}

CHOICES: dict[str, Callable[[TrainingTask], TrainedModel]] = {
    "as it is": ours,
    **{f"positions {rule}": ours for rule in POSITION_RULES},
    **{f"references read at {share}": ours for share in READ_AT},
    "keys before the norm": ours,
    "noised": ours_noised,
    "trained with references, drawn without": drawn_with(strength=0.0),
    "word alone": textual_inversion,
}


def as_changed(name: str, network: Any) -> contextlib.AbstractContextManager[None]:
    """What has to be in place while teaching and while drawing."""
    before_norm = type("KeysBeforeNorm", (KeysBeforeNorm,), {"network": network})
    changes: dict[str, Replacements] = {
        **{f"positions {rule}": ((POSITIONS, lambda *_, rule=rule: rule),) for rule in POSITION_RULES},
        **{f"references read at {share}": ((CLEAN_SIGMA, sigma_at(share)),) for share in READ_AT},
        "keys before the norm": ((RECORDER, before_norm),),
    }
    return replaced(*changes.get(name, ()))
