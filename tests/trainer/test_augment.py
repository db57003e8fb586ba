"""Pictures that come a little changed: parts of larger ones, mirrored ones, other colours."""

import itertools
from collections import Counter

import pytest
import torch

from sa_inject.trainer.augment import jittered, random_window
from sa_inject.trainer.examples import Example, TrainingSet, Version
from tests.trainer.test_options import run, same, values
from tests.trainer.tiny_denoiser import example, fresh_subject


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(height: int, width: int) -> torch.Tensor:
    """A latent whose values say where they are: (1, 1, h, w)"""
    return torch.arange(height * width).float().view(1, 1, height, width)


# --- Windows


def test_every_window_of_a_picture_is_drawn_and_has_its_size():
    latent, chance = numbered(5, 6), generator()
    corners = Counter()
    for _ in range(400):
        part, mask = random_window(latent, None, (4, 4), chance)
        assert part.shape == (1, 1, 4, 4) and mask is None
        assert torch.equal(part[0, 0] - part[0, 0, 0, 0], numbered(5, 6)[0, 0, :4, :4])
        corners[int(part[0, 0, 0, 0])] += 1
    assert set(corners) == {0, 1, 2, 6, 7, 8} and min(corners.values()) > 400 / 6 / 2


def test_window_of_the_whole_picture_draws_nothing():
    latent, chance = numbered(4, 4), generator()
    before = chance.get_state()
    part, _ = random_window(latent, None, (4, 4), chance)
    assert part is latent and torch.equal(chance.get_state(), before)


def test_mask_goes_with_its_window_and_some_of_the_subject_is_in_it():
    latent, mask = numbered(8, 8), torch.zeros(8, 8)
    mask[7, 7] = 1.0
    for seed in range(30):
        part, seen = random_window(latent, mask, (4, 4), generator(seed))
        assert seen is not None and seen.sum() == 1
        assert part[0, 0][seen == 1].item() == 63


def test_mask_without_a_subject_gives_the_middle():
    part, mask = random_window(numbered(6, 6), torch.zeros(6, 6), (4, 4), generator())
    assert part[0, 0, 0, 0] == 7 and mask is not None and mask.shape == (4, 4)


# --- Colours


def test_jitter_changes_colours_and_stays_within_a_picture():
    picture = torch.rand(1, 3, 8, 8, generator=generator())
    changed = [jittered(picture, 0.5, generator(seed)) for seed in range(10)]
    assert all(0 <= one.min() and one.max() <= 1 and one.shape == picture.shape for one in changed)
    assert all((one - picture).abs().mean() > 0.01 for one in changed)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(changed, 2))


def test_jitter_of_nothing_is_nothing_and_more_is_more():
    picture = torch.rand(1, 3, 8, 8, generator=generator())
    torch.testing.assert_close(jittered(picture, 0.0, generator()), picture)
    distances = [(jittered(picture, amount, generator(3)) - picture).abs().mean().item() for amount in (0.1, 0.3, 0.9)]
    assert distances == sorted(distances)


def test_jitter_keeps_grey_grey():
    grey = torch.rand(1, 1, 8, 8, generator=generator()).expand(1, 3, 8, 8)
    changed = jittered(grey, 0.6, generator(1))
    torch.testing.assert_close(changed[:, :1].expand(1, 3, 8, 8), changed)


# --- Versions of an example


def versioned(seed: int) -> Example:
    """A picture that comes as a target from +100 and larger, and as an image prompt from +200 or +300."""
    plain = example(seed)
    wide = torch.nn.functional.pad(plain.latent, (1, 1, 1, 1), value=0.5) + 100
    references = (Version(plain.latent + 200, None), Version(plain.latent + 300, None))
    return Example(plain.latent, plain.captions, as_target=(Version(wide, None),), as_reference=references)


def test_picture_comes_as_the_versions_for_its_part():
    data = TrainingSet([versioned(seed) for seed in range(3)])
    pairs = list(itertools.islice(data.pairs(0.0, generator()), 60))
    assert all(pair.target.latent.shape == (1, 4, 4, 4) for pair in pairs)
    assert all(90 < pair.target.latent.mean() < 110 for pair in pairs)
    means = {round(pair.reference.latent.mean().item(), -2) for pair in pairs if pair.reference is not None}
    assert means == {200.0, 300.0}


def test_views_come_as_their_versions_too():
    alone, view = example(0), versioned(1)
    data = TrainingSet([alone], [view])
    (pair,) = itertools.islice(data.pairs(0.0, generator()), 1)
    assert pair.reference is not None and pair.reference.latent.mean() > 150


@pytest.mark.parametrize("after", [1, 3])
def test_run_over_versions_goes_on_as_if_it_had_never_stopped(tmp_path, after):
    data = TrainingSet([versioned(seed) for seed in range(3)])
    whole = fresh_subject()
    list(run(whole, data, 5))
    training = run(fresh_subject(), data, 5)
    list(itertools.islice(training, after))
    torch.save(training.state_dict(), tmp_path / "state")
    resumed = fresh_subject()
    training = run(resumed, data, 5)
    training.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    list(training)
    assert same(values(resumed), values(whole))
