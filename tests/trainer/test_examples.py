"""Which picture is the reference of which."""

import itertools
from collections import Counter

import pytest
import torch

from sa_inject.trainer.examples import Example, Pair, TrainingSet, group_by_shape
from tests.trainer.tiny_denoiser import example


def draw(data: TrainingSet, count: int, dropout: float = 0.0, seed: int = 0) -> list[Pair]:
    return list(itertools.islice(data.pairs(dropout, torch.Generator().manual_seed(seed)), count))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_picture_is_never_its_own_image_prompt(size):
    data = TrainingSet([example(seed) for seed in range(size)])
    pairs = draw(data, 40 * size)
    assert not any(pair.reference is pair.target for pair in pairs)
    combinations = {(id(pair.target), id(pair.reference)) for pair in pairs}
    assert len(combinations) == size * (size - 1)  # and every other picture is


def test_every_picture_comes_once_in_every_epoch():
    examples = [example(seed) for seed in range(4)]
    targets = [id(pair.target) for pair in draw(TrainingSet(examples), 40)]
    epochs = [tuple(targets[start : start + 4]) for start in range(0, 40, 4)]
    assert all(set(epoch) == {id(e) for e in examples} for epoch in epochs)
    assert len(set(epochs)) > 1  # in another order


def test_views_serve_as_image_prompts_of_a_single_picture():
    picture, views = example(0), [example(1), example(2)]
    pairs = draw(TrainingSet([picture], views), 30)
    assert all(pair.target is picture for pair in pairs)
    assert {id(pair.reference) for pair in pairs} == {id(view) for view in views}


def test_views_are_not_needed_by_two_pictures():
    examples, view = [example(0), example(1)], example(2)
    assert not any(pair.reference is view for pair in draw(TrainingSet(examples, [view]), 30))


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="no pictures"):
        TrainingSet([])


def test_single_picture_without_views_is_refused():
    with pytest.raises(ValueError, match="augmented views"):
        TrainingSet([example(0)])


def test_same_seed_gives_the_same_pairs():
    captions = ("a sks", "the sks", "sks")
    data = TrainingSet([Example(example(seed).latent, captions) for seed in range(4)])
    first, again, other = (draw(data, 24, dropout=0.3, seed=seed) for seed in (1, 1, 2))
    assert key(first) == key(again)
    assert key(first) != key(other)


def test_stream_that_is_told_what_waits_goes_on_as_the_other_would():
    data = TrainingSet([example(seed) for seed in range(4)])
    generator = torch.Generator().manual_seed(1)
    stream = data.pairs(0.3, generator)
    list(itertools.islice(stream, 6))
    state, remaining = generator.get_state(), list(stream.remaining)
    expected = list(itertools.islice(stream, 12))

    generator.set_state(state)
    other = data.pairs(0.3, generator)
    other.remaining = remaining
    assert key(list(itertools.islice(other, 12))) == key(expected)


def key(pairs: list[Pair]) -> list[tuple]:
    return [(id(pair.target), pair.caption, id(pair.reference)) for pair in pairs]


def test_all_captions_of_a_picture_are_drawn():
    captions = ("a sks", "the sks", "sks")
    data = TrainingSet([Example(example(0).latent, captions), Example(example(1).latent, ("other",))])
    pairs = draw(data, 60)
    assert {pair.caption for pair in pairs if pair.target is data.examples[0]} == set(captions)
    assert {pair.caption for pair in pairs if pair.target is data.examples[1]} == {"other"}


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.1, 0.07, 0.13), (1.0, 1, 1)])
def test_references_are_dropped_at_the_given_rate(dropout, low, high):
    data = TrainingSet([example(0), example(1)])
    dropped = Counter(pair.reference is None for pair in draw(data, 1000, dropout))[True]
    assert low <= dropped / 1000 <= high


def test_dropout_leaves_the_other_draws_as_they_were():
    data = TrainingSet([example(seed) for seed in range(3)])
    without, some = draw(data, 30), draw(data, 30, dropout=0.5)
    assert [pair.target for pair in without] == [pair.target for pair in some]
    assert all(b.reference is None or b.reference is a.reference for a, b in zip(without, some, strict=True))


def test_groups_are_of_one_shape_and_lose_nothing():
    small, wide, other = example(0), example(1, 4, 6), example(2)
    pairs = [Pair(small, "1", wide), Pair(wide, "2", small), Pair(other, "3", wide), Pair(small, "4", None)]
    pairs.append(Pair(other, "5", small))  # a target as before, and a reference of another size
    assert group_by_shape(pairs) == [[0, 2], [1], [3], [4]]
