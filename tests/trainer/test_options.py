"""What a training can do beyond the method: each option does something, its extremes too, and its absence nothing."""

import dataclasses
import itertools

import pytest
import torch

from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.examples import Example, TrainingSet
from sa_inject.trainer.loop import Training
from sa_inject.trainer.options import TrainOptions
from tests.trainer.test_loop import MASK, A, B, GivenPairs, Pair, Recording, pictures, values, warmed_up
from tests.trainer.tiny_denoiser import CPU, REFERENCE_CAPTION, Subject, example, fresh_subject

RATES = {"lora_learning_rate": 1e-2, "token_learning_rate": 1e-2}


def run(subject: Subject, data: TrainingSet, steps: int = 4, options: dict | None = None, **settings) -> Training:
    settings = {**RATES, "reference_dropout": 0.0, "reference_start": 0.0, "average_power": None, **settings}
    config = TrainConfig(steps=steps, options=TrainOptions(**options or {}), **settings)
    return Training(subject.denoiser, data, subject.lora, subject.tokens, REFERENCE_CAPTION, config, CPU)


def learned(data: TrainingSet, steps: int = 4, options: dict | None = None, **settings) -> dict[str, torch.Tensor]:
    subject = warmed_up(fresh_subject())
    list(run(subject, data, steps, options, **settings))
    return values(subject)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def masked_pictures() -> TrainingSet:
    return TrainingSet([Example(e.latent, e.captions, MASK) for e in pictures().examples])


# --- Values that cannot work


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", "sgd", "optimizer is 'sgd'; it is one of adamw, prodigy"),
        ("schedule", "step", "schedule is 'step'; it is one of constant, cosine, linear"),
        ("warmup_steps", -1, "warmup_steps is -1; it must not be negative"),
        ("prior_weight", -0.5, "prior_weight is -0.5; it must be a number that is not negative"),
        ("min_snr_gamma", float("inf"), "min_snr_gamma is inf; it must be a number that is not negative"),
        ("caption_dropout", 1.1, "caption_dropout is 1.1; it is a share from 0 to 1"),
        ("background_weight", float("nan"), "background_weight is nan; it is a share from 0 to 1"),
        ("token_freeze_after", 2, "token_freeze_after is 2; it is a share from 0 to 1"),
        ("random_crops", 1, "random_crops is 1; it is a share from 0 to below 1"),
        ("color_jitter", -0.1, "color_jitter is -0.1; it is a share from 0 to below 1"),
    ],
)
def test_option_that_cannot_work_is_refused_by_name_and_value(name, value, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**{name: value})


# --- Every option does something, and goes on after a stop as if there had been none

ONE_OF_EACH = {
    "cosine": {"schedule": "cosine"},
    "linear": {"schedule": "linear"},
    "warm-up": {"warmup_steps": 3},
    "prior": {"prior_weight": 1.0},
    "caption dropout": {"caption_dropout": 0.5},
    "background": {"background_weight": 0.3},
    "min-SNR": {"min_snr_gamma": 1.0},
    "token norm": {"keep_token_norm": True},
    "token freeze": {"token_freeze_after": 0.5},
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_option_does_something_and_resumes_bit_for_bit(name, tmp_path):
    data, options = masked_pictures(), ONE_OF_EACH[name]
    plain = learned(data, steps=6)
    whole = learned(data, steps=6, options=options, average_power=4.0)
    assert not same(plain, whole)

    stopped = warmed_up(fresh_subject())
    training = run(stopped, data, 6, options, average_power=4.0)
    list(itertools.islice(training, 4))
    torch.save(training.state_dict(), tmp_path / "state")
    resumed = warmed_up(fresh_subject())
    training = run(resumed, data, 6, options, average_power=4.0)
    training.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    list(training)
    assert same(values(resumed), whole)


def test_options_that_are_off_change_nothing():
    explicit = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    assert same(learned(masked_pictures(), options=explicit), learned(masked_pictures()))


# --- The learned word


def test_word_keeps_the_length_of_its_vectors_where_that_is_wanted():
    subject = fresh_subject()
    before = subject.tokens[0].detach().norm(dim=-1)
    direction = subject.tokens[0].detach().clone()
    training = run(subject, pictures(), 5, {"keep_token_norm": True}, token_learning_rate=0.1, average_power=1.0)
    for _ in training:
        assert torch.allclose(subject.tokens[0].norm(dim=-1), before, rtol=1e-6)
    training.apply_average()
    assert torch.allclose(subject.tokens[0].norm(dim=-1), before, rtol=1e-6)
    assert not torch.allclose(subject.tokens[0], direction, rtol=1e-2)
    free = fresh_subject()
    list(run(free, pictures(), 5, token_learning_rate=0.1))
    assert not torch.allclose(free.tokens[0].norm(dim=-1), before, rtol=1e-3)


@pytest.mark.parametrize(("share", "moving"), [(0.0, 0), (0.4, 2), (0.5, 3), (1.0, 6)])
def test_word_does_not_change_after_its_share_of_the_steps(share, moving):
    subject = fresh_subject(Recording)
    words = [subject.tokens[0].detach().clone()]
    training = run(subject, pictures(), 6, {"token_freeze_after": share})
    rates = []
    for _ in training:
        words.append(subject.tokens[0].detach().clone())
        rates.append(training.learning_rates[1])
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(words)]
    assert moved == [True] * moving + [False] * (6 - moving)
    assert rates == [1e-2] * moving + [0.0] * (6 - moving)
    # Its captions are encoded once then, and not in every step.
    assert len(subject.denoiser.captions) <= 1 + moving + 1


# --- Captions


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 0.18, 0.42), (1.0, 1, 1)])
def test_captions_are_dropped_at_the_given_rate(share, low, high):
    subject = fresh_subject(Recording)
    list(run(subject, pictures(), 12, {"caption_dropout": share}, batch_size=8, reference_dropout=1.0))
    said = [caption for captions in subject.denoiser.captions[1:] for caption in captions]
    assert len(said) == 96 and low <= said.count("") / 96 <= high


def test_word_does_not_learn_from_empty_captions():
    before = values(warmed_up(fresh_subject()))
    after = learned(pictures(), options={"caption_dropout": 1.0})
    assert torch.equal(after["token"], before["token"])
    assert all(not torch.equal(after[name], before[name]) for name in before if name != "token")


# --- Masks


def test_background_weighs_as_it_is_told():
    def loss(weight: float) -> float:
        subject = warmed_up(fresh_subject())
        pairs = GivenPairs([Pair(Example(A.latent, A.captions, MASK), "sks", B)])
        return next(run(subject, pairs, 1, {"background_weight": weight})).loss

    inside, everywhere = loss(0.0), loss(1.0)
    outside_share = (1 - MASK).sum().item()
    # Mean over all cells, and over those inside: what lies outside follows from both.
    outside = (16 * everywhere - MASK.sum().item() * inside) / outside_share
    half = (MASK.sum().item() * inside + 0.5 * outside_share * outside) / (MASK.sum().item() + 0.5 * outside_share)
    assert loss(0.5) == pytest.approx(half, rel=1e-4)
    unmasked = next(run(warmed_up(fresh_subject()), GivenPairs([Pair(A, "sks", B)]), 1)).loss
    assert everywhere == pytest.approx(unmasked, rel=1e-5)


# --- Batches


class ChanceOfItsPicture(Recording):
    """Has one noise level, and noise that follows from the picture: the same in any order and batch."""

    def __init__(self, token) -> None:
        super().__init__(token)
        self.sigmas = self.sigmas[9:10]

    def add_noise(self, latent, noise, sigma):
        return super().add_noise(latent, latent.flip(1).roll(1, -1), sigma)


FOUR = [
    Pair(example(0), "a red sks", example(1)),
    Pair(example(1), "sks on a table", example(2)),
    Pair(example(2), "the sks in snow", example(3)),
    Pair(example(3), "sks", example(0)),
]


@pytest.mark.parametrize("options", [{}, {"prior_weight": 0.7}, {"min_snr_gamma": 0.5}], ids=["plain", "prior", "snr"])
@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_batch_of_four_with_four_captions_equals_four_accumulated_steps(mode, options):
    results = []
    for settings, at_once in (
        ({"batch_size": 4}, None),
        ({"batch_size": 1, "gradient_accumulation": 4}, None),
        ({"batch_size": 4}, 1),
        ({"batch_size": 4}, 3),
    ):
        subject = warmed_up(fresh_subject(ChanceOfItsPicture))
        training = run(subject, GivenPairs(FOUR), 3, options, reference_mode=mode, **settings)
        training.max_rows = at_once
        results.append(([step.loss for step in training], values(subject)))
    (losses, whole), *others = results
    for found, parts in others:
        assert found == pytest.approx(losses, rel=1e-4)
        for name, tensor in whole.items():
            assert (parts[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def test_each_row_of_a_batch_is_denoised_under_its_own_caption():
    subject = fresh_subject(ChanceOfItsPicture)
    next(run(subject, GivenPairs(FOUR), 1, batch_size=4))
    assert subject.denoiser.captions[1:] == [tuple(pair.caption for pair in FOUR)]


def test_step_that_ran_out_of_memory_is_taken_again_in_smaller_parts():
    whole = warmed_up(fresh_subject())
    expected = [step.loss for step in run(whole, pictures(), 3, batch_size=3)]

    class FullAbove(Recording):
        def denoise(self, noisy, sigma, text, references):
            if len(noisy) > 1:
                raise MemoryError
            return super().denoise(noisy, sigma, text, references)

    subject = warmed_up(fresh_subject(FullAbove))
    training = run(subject, pictures(), 3, batch_size=3)
    with pytest.raises(MemoryError):
        next(training)
    training.load_state_dict(training.state_dict())
    training.max_rows = 1
    assert [step.loss for step in training] == pytest.approx(expected, rel=1e-4)
    for name, tensor in values(whole).items():
        assert (values(subject)[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
