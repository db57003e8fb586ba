"""Prior preservation: prompts with the class word alone keep the result of the frozen model.

Without the placeholder token and without a reference, the model is frozen, and there is nothing to preserve. So both
losses use a reference of the subject: with the class word alone, it must have no effect.
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
    """An endless stream of class pictures, each with a picture of the subject as reference.

    Class pictures as in DreamBooth (Ruiz et al., 2023, section 3.2), where there is no reference.
    """

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
    """Squared distance of predictions under the class word with and without a reference. -> (b,)

    noisy (b, c, h, w) is the latent of the ordinary loss, so no class pictures are needed.
    """
    with torch.no_grad():
        frozen = denoiser.denoise(noisy, sigma, class_text, None)
    return prediction_loss(denoiser.denoise(noisy, sigma, class_text, references), frozen, output_scale)
