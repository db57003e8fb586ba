"""Prior preservation: under the class word alone, an image prompt of the subject is to change nothing."""

import dataclasses

import pytest
import torch

from sa_inject.trainer.examples import TrainingSet
from sa_inject.trainer.prior import frozen_prediction_loss
from tests.trainer.test_loop import GivenPairs, Pair, Recording, naive_loss, pictures, values, warmed_up
from tests.trainer.test_options import run, same
from tests.trainer.tiny_denoiser import CPU, REFERENCE_CAPTION, Subject, example, fresh_subject

NOISY, SIGMA = example(7).latent, torch.tensor([0.8])


def moved(subject: Subject) -> torch.Tensor:
    """How far an image prompt moves what is drawn under the class word, (1,)"""
    model = subject.denoiser
    text = model.encode([REFERENCE_CAPTION])
    bank = model.read_reference(example(1).latent, None, text, None, subject.lora.deltas(CPU, torch.float32))
    return frozen_prediction_loss(model, NOISY, SIGMA, text, bank, model.output_scale(SIGMA))


def test_nothing_has_moved_before_the_first_step_and_then_something_has():
    assert moved(fresh_subject()).item() == 0.0  # the values of a fresh LoRA are zero
    assert moved(warmed_up(fresh_subject())).item() > 0.0


def test_loss_is_the_pairs_own_and_the_weighted_distance_from_the_frozen_model():
    pair = Pair(example(0), "a sks", example(1))
    subject = warmed_up(fresh_subject(Recording))
    found = next(run(subject, GivenPairs([pair]), 1, {"prior_weight": 0.5})).loss

    twin = warmed_up(fresh_subject())
    (drawn,) = subject.denoiser.noised
    own = naive_loss(twin, pair, drawn.sigma, drawn.noise)
    model, text = twin.denoiser, twin.denoiser.encode([REFERENCE_CAPTION])
    noisy = pair.target.latent + drawn.sigma.view(1, 1, 1, 1) * drawn.noise
    bank = model.read_reference(example(1).latent, None, text, None, twin.lora.deltas(CPU, torch.float32))
    frozen = model.denoise(noisy, drawn.sigma, text, None)
    distance = ((model.denoise(noisy, drawn.sigma, text, bank) - frozen) / drawn.sigma).square().mean()
    assert distance.item() > 0
    assert found == pytest.approx(own.item() + 0.5 * distance.item(), rel=1e-4)


@pytest.mark.parametrize("weight", [3.0])
def test_training_with_a_prior_moves_the_class_less(weight):
    distances = []
    for options in ({}, {"prior_weight": weight}):
        subject = fresh_subject()
        list(run(subject, pictures(), 40, options, batch_size=2))
        distances.append(moved(subject).item())
    assert distances[1] < 0.7 * distances[0]


def test_word_learns_nothing_from_the_prior():
    """Its gradient is that of the pairs alone: the class word alone is what the prior is asked under."""
    words = []
    for options in ({}, {"prior_weight": 5.0}):
        subject = warmed_up(fresh_subject())
        next(run(subject, pictures(), 1, options, max_gradient_norm=1e9))
        words.append(subject.tokens[0].detach().clone())
    assert torch.equal(*words)


def test_pairs_without_an_image_prompt_have_no_prior():
    data = GivenPairs([Pair(example(0), "a sks", None)])
    ends = []
    for options in ({}, {"prior_weight": 5.0}):
        subject = fresh_subject()
        list(run(subject, data, 3, options))
        ends.append(values(subject))
    assert same(*ends)


# --- with pictures of the class


def with_class_pictures() -> TrainingSet:
    others = [dataclasses.replace(example(seed), captions=("a photo of teapot",)) for seed in (20, 21)]
    return TrainingSet(pictures().examples, class_pictures=others)


def test_class_pictures_are_learned_under_their_captions_beside_the_subject():
    subject = fresh_subject(Recording)
    list(run(subject, with_class_pictures(), 4, {"prior_weight": 1.0}, batch_size=2))
    captions = subject.denoiser.captions[1:]
    assert captions[::2] == [("a photo of sks teapot",) * 2] * 4
    assert captions[1::2] == [("a photo of teapot",) * 2] * 4
    class_latents = {id(e.latent): e.latent for e in with_class_pictures().class_pictures}
    targets = subject.denoiser.noised[1::2]
    assert all(any(torch.equal(row, e[0]) for e in class_latents.values()) for call in targets for row in call.latent)
    # Their image prompts show the subject.
    shown = [example.latent for example in pictures().examples]
    assert all(any(torch.equal(row, e[0]) for e in shown) for read in subject.denoiser.read for row in read.latent)


def test_class_pictures_are_seen_only_at_noise_levels_that_have_an_image_prompt():
    subject = fresh_subject(Recording)
    list(run(subject, with_class_pictures(), 20, {"prior_weight": 1.0}, reference_start=0.4))
    limit = subject.denoiser.sigmas[12]
    assert all(bool((call.sigma < limit).all()) for call in subject.denoiser.noised[1::2])


def test_class_pictures_without_weight_are_not_used():
    ends = []
    for data in (pictures(), with_class_pictures()):
        subject = fresh_subject()
        list(run(subject, data, 3))
        ends.append(values(subject))
    assert same(*ends)


def test_class_pictures_weigh_as_they_are_told():
    def losses(weight: float) -> float:
        return next(run(warmed_up(fresh_subject()), with_class_pictures(), 1, {"prior_weight": weight})).loss

    one, two, three = losses(1.0), losses(2.0), losses(3.0)
    assert two - one == pytest.approx(three - two, rel=1e-3) and two > one


def test_run_with_class_pictures_goes_on_as_if_it_had_never_stopped(tmp_path):
    options = {"prior_weight": 1.0}
    whole = fresh_subject()
    list(run(whole, with_class_pictures(), 6, options))
    stopped = run(fresh_subject(), with_class_pictures(), 6, options)
    for _ in range(3):
        next(stopped)
    torch.save(stopped.state_dict(), tmp_path / "state")
    resumed = fresh_subject()
    training = run(resumed, with_class_pictures(), 6, options)
    training.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    list(training)
    assert same(values(resumed), values(whole))
