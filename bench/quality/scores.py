"""Scores of pictures by the judge, and their means over subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from demo.base.judge import Judge, measure
from demo.base.scenes import Scene, render

from ..bootstrap import interval
from .subjects import Subject, factors


class Scored(NamedTuple):
    """One method on one subject: shares and means over all of its pictures."""

    similarity: float  # cosine of identity embeddings to real scenes of the subject; negative counts as 0
    top_1: float  # the subject is the likeliest of all artwork
    top_3: float
    fidelity: float  # size, side, background colour and pattern are all as asked
    size: float
    side: float
    colour: float
    pattern: float
    harmonic: float  # harmonic mean of similarity and fidelity
    copying: float  # factors shared with the nearest reference scene, minus those that the prompts share with it


def score(judge: Judge, subject: Subject, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> Scored:
    """`scenes[i]` is the scene that `images[i]` should show."""
    seen = [measure(image) for image in images]
    embedded = judge.embed(list(images), seen)  # (b, width)
    similarity = float((embedded @ target_embedding(judge, subject)).clamp(min=0).mean())
    ranks = [found.index(subject.artwork) for found in judge.rank_embedded(embedded)]
    right = np.array(
        [
            [a == b for a, b in zip(factors(s), factors(scene), strict=True)]
            for s, scene in zip(seen, scenes, strict=True)
        ]
    )
    fidelity = float(right.all(axis=1).mean())
    copied = np.mean([nearest(s, subject) - nearest(scene, subject) for s, scene in zip(seen, scenes, strict=True)])
    return Scored(
        similarity,
        float(np.mean([rank == 0 for rank in ranks])),
        float(np.mean([rank < 3 for rank in ranks])),
        fidelity,
        *(float(share) for share in right.mean(axis=0)),
        harmonic_mean(similarity, fidelity),
        float(copied),
    )


def target_embedding(judge: Judge, subject: Subject) -> Tensor:
    """The subject's embedding: the mean over real scenes of it that no method has seen. -> (width,)"""
    return F.normalize(judge.embed([render(scene) for scene in subject.unseen]).mean(dim=0), dim=0)


def nearest(scene: Any, subject: Subject) -> float:
    """Share of factors that agree with the most similar reference scene."""
    shares = [np.mean([a == b for a, b in zip(factors(scene), factors(r), strict=True)]) for r in subject.references]
    return float(max(shares))


def harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def base_fidelity(judge: Judge, images: Sequence[Image.Image], scenes: Sequence[Scene]) -> float:
    """Share of pictures of base objects in which object and scene are all as asked."""
    return float(np.mean([all(verdict) for verdict in judge.verdicts(list(images), list(scenes))]))


def bootstrap(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over subjects and its 95 % interval. Of one subject, the value alone."""
    mean = sum(values) / len(values)
    return mean, *(interval(values) or (mean, mean))


def paired(ours: dict[str, float], theirs: dict[str, float]) -> tuple[float, float, float]:
    """Mean difference over the subjects that both have, with its interval."""
    common = sorted(ours.keys() & theirs.keys())
    return bootstrap([ours[name] - theirs[name] for name in common])
