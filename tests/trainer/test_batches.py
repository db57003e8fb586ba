"""Random batches: a state that is restored gives the same batches again."""

import torch

from sa_inject.trainer.batches import BatchSampler
from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.examples import Example, TrainingSet
from sa_inject.trainer.noised import NoisedPairs
from sa_inject.trainer.options import TrainOptions
from tests.trainer.tiny_denoiser import CPU, example

SIGMAS = torch.linspace(0.1, 10.0, 20)


def sampler(data: TrainingSet, **settings) -> BatchSampler:
    return BatchSampler(data, SIGMAS, TrainConfig(**{"batch_size": 3} | settings), CPU)


def drawn(batches: BatchSampler) -> list[NoisedPairs]:
    return [*batches.draw().groups, *batches.draw_class_pictures().groups]


def test_a_restored_state_gives_the_same_batch_again():
    data = TrainingSet([example(seed) for seed in range(5)], class_pictures=[example(9)])
    batches = sampler(data, reference_mode="noised")
    drawn(batches)
    state = batches.state()
    first, then = drawn(batches), drawn(batches)
    batches.restore(state)
    for old, new in zip(first, drawn(batches), strict=True):
        assert all(one is two for a, b in zip(old.pairs, new.pairs, strict=True) for one, two in zip(a, b, strict=True))
        assert torch.equal(old.sigma, new.sigma)
        assert torch.equal(old.noise, new.noise)
    assert not torch.equal(first[0].noise, then[0].noise)


def test_a_batch_is_grouped_by_shape_and_has_every_pair_once():
    data = TrainingSet([example(0), example(1), example(2, 4, 6)])
    batch = sampler(data, reference_dropout=0.0).draw()
    groups = list(batch.groups)
    assert batch.size == sum(len(group.pairs) for group in groups) == 3
    targets = [pair.target for group in groups for pair in group.pairs]
    assert set(map(id, targets)) == set(map(id, data.examples))
    assert all(len({pair.target.latent.shape for pair in group.pairs}) == 1 for group in groups)


def test_references_are_used_below_the_start_only():
    data = TrainingSet([example(seed) for seed in range(3)], class_pictures=[example(9)])
    batches = sampler(data, reference_dropout=0.0, reference_start=0.5, batch_size=40)
    for group in batches.draw().groups:
        for pair, sigma in zip(group.pairs, group.sigma, strict=True):
            assert (pair.reference is not None) == bool(sigma < SIGMAS[10])
    assert all((group.sigma < SIGMAS[10]).all() for group in batches.draw_class_pictures().groups)


def test_captions_are_dropped_at_their_rate():
    examples = [Example(example(seed).latent, ("a sks",)) for seed in range(3)]
    for rate, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        batches = sampler(TrainingSet(examples), batch_size=200, options=TrainOptions(caption_dropout=rate))
        empty = [pair.caption == "" for group in batches.draw().groups for pair in group.pairs]
        assert low <= sum(empty) <= high
