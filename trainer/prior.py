"""Prior preservation: what is drawn under the class word alone stays as the frozen model draws it.

Without the word and without an image prompt the model is frozen, and nothing could change. So both losses are asked
with an image prompt of the subject: beside the class word alone it must change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.image_prompt import TextConditioning
from .denoiser import Denoiser, References
from .examples import Pair, TrainingSet, choice
from .objective import prediction_loss


class ClassPairs(Iterator[Pair]):
    """Pictures of the class without end, with a picture of the subject as image prompt (DreamBooth, Ruiz et al., 2023,
    section 3.2, whose class pictures have no image prompt)."""

    def __init__(self, data: TrainingSet, generator: torch.Generator) -> None:
        self._data = data
        self._references = list(data.views or data.examples)
        self._generator = generator

    def __next__(self) -> Pair:
        target = choice(self._data.class_pictures, self._generator)
        caption = choice(target.captions, self._generator)
        reference = choice(self._references, self._generator)
        return Pair(target, caption, reference.drawn(reference.as_reference, self._generator))


def frozen_prediction_loss(
    denoiser: Denoiser,
    noisy: Tensor,
    sigma: Tensor,
    class_text: TextConditioning,
    references: References,
    output_scale: Tensor,
) -> Tensor:
    """How far an image prompt moves the prediction under the class word from the frozen model's own. -> (b,)

    noisy (b, c, h, w) is the latent of the ordinary loss, so that no class pictures are needed.
    """
    with torch.no_grad():
        frozen = denoiser.denoise(noisy, sigma, class_text, None)
    return prediction_loss(denoiser.denoise(noisy, sigma, class_text, references), frozen, output_scale)
