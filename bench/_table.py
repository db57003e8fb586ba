"""The methods of the table, and the learning rates that each is tried at.

Import only once the host is started.
"""

from __future__ import annotations

from _methods import (
    Method,
    base_model,
    full_fine_tune,
    full_fine_tune_with_prior,
    host_lora,
    ours,
    ours_matched,
    peft_lora,
    textual_inversion,
    untrained_reference,
)


def with_words(*rates: float) -> tuple[tuple[float, float], ...]:
    """Each rate with each rate of the word's."""
    return tuple((rate, word) for word in (2e-3, 6e-3) for rate in rates)


METHODS: dict[str, Method] = {
    "base": Method(base_model),
    "textual inversion": Method(textual_inversion, ((0.0, 1e-3), (0.0, 3e-3), (0.0, 1e-2))),
    "reference attention, untrained": Method(untrained_reference),
    "TrainLoraNode": Method(host_lora, ((1e-3, 0.0), (3e-3, 0.0), (1e-2, 0.0))),
    "PEFT LoRA": Method(peft_lora, with_words(3e-4, 1e-3, 3e-3)),
    "full fine-tune": Method(full_fine_tune, with_words(1e-5, 3e-5, 1e-4)),
    "full fine-tune, prior": Method(full_fine_tune_with_prior, swept_as="full fine-tune"),
    "ours, clean": Method(ours, with_words(3e-4, 1e-3, 3e-3)),
    "ours, matched": Method(ours_matched, swept_as="ours, clean"),
}
