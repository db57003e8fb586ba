"""The training loop on the tiny UNet: what moves, what does not, and what a step's loss is made of."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sa_inject.core.image_prompt import TextConditioning
from sa_inject.trainer.config import TrainConfig
from sa_inject.trainer.examples import Example, Pair, TrainingSet, group_by_shape
from sa_inject.trainer.loop import DivergedError, Training
from sa_inject.trainer.objective import prediction_loss
from tests.trainer.tiny_denoiser import CPU, REFERENCE_CAPTION, Subject, TinyDenoiser, example, fresh_subject

FAST = {"lora_learning_rate": 1e-2, "token_learning_rate": 1e-2, "reference_dropout": 0.0, "reference_start": 0.0}


def run(subject: Subject, data: TrainingSet, **settings) -> Training:
    config = TrainConfig(**FAST | settings)
    return Training(subject.denoiser, data, subject.lora, subject.tokens, REFERENCE_CAPTION, config, CPU)


def losses(subject: Subject, data: TrainingSet, **settings) -> list[float]:
    return [step.loss for step in run(subject, data, **settings)]


def pictures(count: int = 3, **settings) -> TrainingSet:
    return TrainingSet([example(seed, **settings) for seed in range(count)])


def trainables(subject: Subject) -> dict[str, nn.Parameter]:
    return {**dict(subject.lora.named_parameters()), "token": subject.tokens[0]}


def values(subject: Subject) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainables(subject).items()}


def gradients(subject: Subject) -> dict[str, Tensor]:
    """Fills with the gradients of the latest step, as they have added up before they are clipped."""
    seen: dict[str, Tensor] = {}
    for name, parameter in trainables(subject).items():
        parameter.register_post_accumulate_grad_hook(keep(seen, name))
    return seen


def keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[name] = parameter.grad.clone()

    return hook


# --- What gets a gradient, and what changes


@pytest.mark.parametrize("mode", ["clean", "noised"])
def test_learning_goes_from_the_values_to_the_keys(mode):
    """While the values are zero nothing depends on the keys, and while a `lora_B` is, nothing on its `lora_A`."""
    subject = fresh_subject()
    seen = gradients(subject)
    steps = run(subject, pictures(), batch_size=2, reference_mode=mode, steps=3)
    for silent in (("to_k", "lora_A"), ("to_k.lora_A",), ()):
        next(steps)
        for name in trainables(subject):
            assert bool(seen[name].isfinite().all()), name
            assert bool(seen[name].any()) != any(part in name for part in silent), name


def test_frozen_weights_have_no_gradient_and_do_not_change():
    subject = fresh_subject()
    before = {name: tensor.clone() for name, tensor in subject.denoiser.unet.state_dict().items()}
    data = pictures()
    latents = [e.latent.clone() for e in data.examples]
    assert len(losses(subject, data, steps=3)) == 3
    assert all(parameter.grad is None for parameter in subject.denoiser.unet.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.denoiser.unet.state_dict().items())
    assert all(torch.equal(e.latent, latent) for e, latent in zip(data.examples, latents, strict=True))


@pytest.mark.parametrize("still", ["lora", "token"])
def test_learning_rate_zero_keeps_its_part_as_it_was(still):
    subject = fresh_subject()
    before = values(subject)
    losses(subject, pictures(), steps=2, weight_decay=0.5, **{f"{still}_learning_rate": 0.0})
    for name, tensor in values(subject).items():
        assert torch.equal(tensor, before[name]) == ((name == "token") == (still == "token")), name


def test_weight_decay_is_for_the_lora_alone():
    moved = []
    for decay in (0.0, 0.9):
        subject = fresh_subject()
        losses(subject, pictures(), steps=1, weight_decay=decay)
        moved.append(values(subject))
    plain, decayed = moved
    assert torch.equal(plain["token"], decayed["token"])
    assert all(not torch.equal(plain[name], decayed[name]) for name in plain if ".lora_A." in name)


def test_without_any_reference_the_word_learns_alone():
    subject = fresh_subject(Recording)
    before = values(subject)
    losses(subject, pictures(), steps=2, batch_size=2, reference_dropout=1.0, weight_decay=0.0)
    assert subject.denoiser.read == []
    assert subject.denoiser.captions == [(REFERENCE_CAPTION,), *[("a photo of sks teapot",) * 2] * 2]
    for name, tensor in values(subject).items():
        assert torch.equal(tensor, before[name]) == (name != "token"), name


@pytest.mark.parametrize("scaling", [False, True])
def test_word_that_does_not_learn_is_read_only_once(scaling):
    subject = fresh_subject(Recording)
    word = subject.tokens[0].detach().clone()
    data = GivenPairs([Pair(A, "a red sks", B), Pair(B, "sks in snow", A)])
    found = losses(subject, data, batch_size=2, steps=3, token_learning_rate=0.0, loss_scaling=scaling)
    assert subject.denoiser.captions == [(REFERENCE_CAPTION,), ("a red sks",), ("sks in snow",)]
    assert torch.equal(subject.tokens[0], word)
    learning = fresh_subject(Recording)  # at a rate too low to change a bit of it
    assert found == losses(learning, data, batch_size=2, steps=3, token_learning_rate=1e-30, loss_scaling=scaling)
    assert len(learning.denoiser.captions) == 4


@pytest.mark.parametrize("scaling", [False, True])
def test_step_without_reference_teaches_nothing_where_the_word_does_not_learn(scaling):
    subject = fresh_subject()
    before = values(subject)
    data = GivenPairs([Pair(A, "a red sks", None), Pair(B, "sks in snow", A)])
    steps = run(subject, data, steps=3, token_learning_rate=0.0, loss_scaling=scaling)
    next(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(subject).items())
    assert next(steps).loss > 0
    assert not all(torch.equal(tensor, before[name]) for name, tensor in values(subject).items())


# --- Learning


def held_out_loss(subject: Subject, data: TrainingSet) -> float:
    """Mean loss over all pairs, noise and noise levels of our own."""
    generator = torch.Generator().manual_seed(1234)
    pairs = [
        Pair(target, target.captions[0], reference)
        for target, reference in itertools.permutations(data.examples, 2)
        for _ in range(4)
    ]
    with torch.no_grad():
        found = [
            naive_loss(
                subject,
                pair,
                subject.denoiser.sigmas[torch.randint(20, (1,), generator=generator)],
                torch.randn(pair.target.latent.shape, generator=generator),
            )
            for pair in pairs
        ]
    return torch.stack(found).mean().item()


@pytest.mark.parametrize(
    ("settings", "fallen_to"),
    [
        ({"steps": 30}, 0.975),
        ({"steps": 12, "token_learning_rate": 0.0}, 0.993),
        ({"steps": 12, "token_learning_rate": 0.3, "lora_learning_rate": 0.0}, 0.995),
        ({"steps": 12, "reference_mode": "noised"}, 0.993),
    ],
    ids=["together", "LoRA alone", "token alone", "noised"],
)
def test_loss_on_held_out_noise_falls_within_fifty_steps(settings, fallen_to):
    subject, data = fresh_subject(rank=4), pictures(2)
    before = held_out_loss(subject, data)
    losses(subject, data, batch_size=4, **settings)
    assert held_out_loss(subject, data) < fallen_to * before


def test_same_seed_gives_the_same_losses_and_another_seed_others():
    runs, ends = [], []
    for seed in (1, 1, 2):
        subject = fresh_subject()
        torch.rand(3)  # the global random state has no part
        state = torch.get_rng_state()
        settings = {"steps": 4, "batch_size": 2, "reference_dropout": 0.3, "reference_mode": "noised"}
        runs.append(losses(subject, pictures(), seed=seed, **settings))
        ends.append(values(subject))
        assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not set(runs[0]) & set(runs[2])


@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_what_is_learned_is_an_average_of_the_steps(power):
    """A step counts as its number to that power: exactly for 0 and 1, about so above."""
    subject = fresh_subject()
    training = run(subject, pictures(), steps=8, average_power=power)
    seen = [values(subject) for _ in training]
    weights = torch.ones(8)
    for number in range(2, 9):
        share = (power + 1) / (power + number)
        weights[: number - 1] *= 1 - share
        weights[number - 1] = share
    training.apply_average()
    for name, tensor in values(subject).items():
        expected = sum(weight * then[name] for weight, then in zip(weights, seen, strict=True))
        assert torch.allclose(tensor, expected, rtol=1e-5, atol=1e-7), name
    if power <= 1:
        exact = torch.arange(1, 9) ** power
        assert torch.allclose(weights, exact / exact.sum())
    assert weights.sum() == pytest.approx(1.0)


def test_without_averaging_the_last_step_is_what_is_learned():
    subject = fresh_subject()
    training = run(subject, pictures(), steps=3, average_power=None)
    *_, _ = training
    last = values(subject)
    training.apply_average()
    assert all(torch.equal(tensor, last[name]) for name, tensor in values(subject).items())
    run(fresh_subject(), pictures(), average_power=None).load_state_dict(training.state_dict())


def test_average_does_not_change_how_the_run_goes_on():
    plain = losses(fresh_subject(), pictures(), steps=4, average_power=None)
    assert losses(fresh_subject(), pictures(), steps=4, average_power=0.0) == plain


def test_steps_are_numbered_from_one():
    assert [step.number for step in run(fresh_subject(), pictures(), steps=3)] == [1, 2, 3]


# --- What a loss is made of


class Noised(NamedTuple):
    latent: Tensor
    noise: Tensor
    sigma: Tensor


class Read(NamedTuple):
    latent: Tensor
    sigma: Tensor | None
    text: TextConditioning
    mask: Tensor | None


class Recording(TinyDenoiser):
    """Keeps what the loop asks for."""

    def __init__(self, token: nn.Parameter) -> None:
        super().__init__(token)
        self.captions: list[tuple[str, ...]] = []
        self.noised: list[Noised] = []
        self.read: list[Read] = []

    def encode(self, captions):
        self.captions.append(tuple(captions))
        return super().encode(captions)

    def add_noise(self, latent, noise, sigma):
        self.noised.append(Noised(latent, noise, sigma))
        return super().add_noise(latent, noise, sigma)

    def read_reference(self, latent, sigma, text, mask, deltas):
        self.read.append(Read(latent, sigma, text, mask))
        return super().read_reference(latent, sigma, text, mask, deltas)


def naive_loss(
    subject: Subject, pair: Pair, sigma: Tensor, noise: Tensor, reference_noise: Tensor | None = None
) -> Tensor:
    """The loss of one pair on its own: sigma (1,), noise (1, c, h, w) -> ()"""
    model, target, reference = subject.denoiser, pair.target, pair.reference
    bank = None
    if reference is not None:
        latent = reference.latent
        if reference_noise is not None:
            latent = latent + sigma.view(1, 1, 1, 1) * reference_noise
        bank = model.read_reference(
            latent,
            None if reference_noise is None else sigma,
            model.encode([REFERENCE_CAPTION]),
            None if reference.mask is None else reference.mask[None],
            subject.lora.deltas(CPU, torch.float32),
        )
    noisy = target.latent + sigma.view(1, 1, 1, 1) * noise
    denoised = model.denoise(noisy, sigma, model.encode([pair.caption]), bank)
    mask = None if target.mask is None else target.mask[None, None]
    return prediction_loss(denoised, target.latent, -sigma.view(1, 1, 1, 1), mask)[0]


class GivenPairs(SimpleNamespace):
    """In place of a TrainingSet: pairs in a given order, that take nothing from the generator."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        super().__init__(given=pairs)

    def pairs(self, reference_dropout: float, generator: torch.Generator) -> Iterator[Pair]:
        return Cycle(self.given)


class Cycle:
    """itertools.cycle, with the one attribute of a PairStream that the loop looks at."""

    remaining: Sequence[int] = ()

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = itertools.cycle(pairs)

    def __iter__(self) -> Iterator[Pair]:
        return self

    def __next__(self) -> Pair:
        return next(self._pairs)


A, B, C = (example(seed) for seed in range(3))
WIDE = example(5, 4, 6)
MASK = torch.tensor([[0.0, 0.2, 1.0, 1.0]] * 3 + [[0.0, 0.0, 0.0, 0.9]])
MASKED, MASKED_WIDE = Example(A.latent, A.captions, MASK), Example(WIDE.latent, WIDE.captions, torch.ones(4, 6))

BATCHES = {
    "one": [Pair(A, "sks", B)],
    "rows": [Pair(A, "a sks", B), Pair(B, "the red sks", C), Pair(C, "sks", A)],
    "masks on some": [Pair(MASKED, "a sks", B), Pair(B, "sks", MASKED), Pair(C, "sks", A)],
    "dropped ones": [Pair(A, "a sks", None), Pair(B, "sks", C), Pair(C, "the sks", None)],
    "mixed sizes": [Pair(A, "a sks", WIDE), Pair(WIDE, "sks", A), Pair(B, "the sks", WIDE), Pair(MASKED_WIDE, "a", B)],
}


@pytest.mark.parametrize("mode", ["clean", "noised"])
@pytest.mark.parametrize("batch", BATCHES)
def test_loss_and_gradient_of_a_batch_are_the_means_of_its_pairs(batch, mode):
    pairs = BATCHES[batch]
    subject = warmed_up(fresh_subject(Recording))
    twin = warmed_up(fresh_subject())
    seen = gradients(subject)
    (step,) = run(subject, GivenPairs(pairs), batch_size=len(pairs), reference_mode=mode, steps=1)
    loss = torch.stack(naive_losses(twin, pairs, mode, subject.denoiser.noised)).mean()
    loss.backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert set(seen) == set(trainables(twin))
    for name, parameter in trainables(twin).items():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert (seen[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_every_pair_of_a_batch_has_a_noise_level_of_its_own():
    subject = fresh_subject(Recording)
    list(run(subject, GivenPairs([Pair(A, "sks", B)]), batch_size=8, steps=40))
    drawn = torch.stack([noised.sigma for noised in subject.denoiser.noised])  # (steps, rows)
    assert drawn.shape == (40, 8)
    assert min(len(set(row.tolist())) for row in drawn) > 2
    assert set(drawn.flatten().tolist()) == set(subject.denoiser.sigmas.tolist())


def warmed_up(subject: Subject) -> Subject:
    """With some `lora_B`, so that there is a gradient of every matrix to be compared."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in subject.lora.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return subject


def naive_losses(subject: Subject, pairs: Sequence[Pair], mode: str, noised: Sequence[Noised]) -> list[Tensor]:
    """The loss of each pair, from the random numbers that the loop drew.

    `noised` has those of each group's targets, followed by those of its references if the mode is noised.
    """
    calls, found = iter(noised), []
    for places in group_by_shape(pairs):
        group, drawn = [pairs[place] for place in places], next(calls)
        with_noise = mode == "noised" and group[0].reference is not None
        drawn_for_references = next(calls) if with_noise else None
        for row, one in enumerate(group):
            noise = None if drawn_for_references is None else drawn_for_references.noise[row : row + 1]
            found.append(naive_loss(subject, one, drawn.sigma[row : row + 1], drawn.noise[row : row + 1], noise))
    assert next(calls, None) is None
    return found


class WithoutChance(TinyDenoiser):
    """Has one noise level, and noise that follows from the picture."""

    def __init__(self, token: nn.Parameter) -> None:
        super().__init__(token)
        self.sigmas = self.sigmas[9:10]

    def add_noise(self, latent, noise, sigma):
        return super().add_noise(latent, latent.flip(1).roll(1, -1), sigma)


def test_accumulated_batches_equal_one_large_batch():
    pairs = [Pair(A, "a sks", B), Pair(WIDE, "the red sks", C), Pair(C, "sks", A), Pair(B, "sks", None)]
    results = []
    for settings in (
        {"batch_size": 4},
        {"batch_size": 2, "gradient_accumulation": 2},
        {"batch_size": 1, "gradient_accumulation": 4},
    ):
        subject = warmed_up(fresh_subject(WithoutChance))
        seen = gradients(subject)
        found = losses(subject, GivenPairs(pairs), steps=2, **settings)
        results.append((found, dict(seen)))
    (expected_losses, expected), *others = results
    for found, seen in others:
        assert found == pytest.approx(expected_losses, rel=1e-5)
        for name, gradient in expected.items():
            assert (seen[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_image_prompt_is_another_picture_and_its_noise_another_noise():
    subject, data = fresh_subject(Recording), pictures()
    losses(subject, data, steps=6, reference_mode="noised")
    noised = subject.denoiser.noised
    assert len(subject.denoiser.read) == 6 and len(noised) == 12
    for target, reference in zip(noised[::2], noised[1::2], strict=True):
        assert not torch.equal(target.latent, reference.latent)
        assert torch.equal(target.sigma, reference.sigma)
    for one, other in itertools.combinations(noised, 2):
        assert (one.noise - other.noise).abs().mean() > 0.5
    assert len({float(call.sigma) for call in noised}) > 2


def test_clean_reference_is_read_without_noise():
    subject, data = fresh_subject(Recording), pictures()
    losses(subject, data, steps=4, reference_mode="clean")
    assert len(subject.denoiser.noised) == 4
    for read, target in zip(subject.denoiser.read, subject.denoiser.noised, strict=True):
        assert read.sigma is None
        assert any(torch.equal(read.latent, e.latent) for e in data.examples)
        assert not torch.equal(read.latent, target.latent)


def test_no_reference_is_read_at_the_noise_levels_before_its_start():
    subject = fresh_subject(Recording)
    losses(subject, pictures(), steps=30, reference_start=0.4)
    first = subject.denoiser.sigmas[12]  # of 20, 60 % lie below
    late = [bool(call.sigma < first) for call in subject.denoiser.noised]
    assert len(late) == 30 and 5 < sum(late) < 25
    assert len(subject.denoiser.read) == sum(late)


def test_masks_stand_beside_ones_for_pictures_without():
    subject = fresh_subject(Recording)
    losses(subject, GivenPairs([Pair(A, "sks", B), Pair(B, "sks", MASKED)]), batch_size=2, steps=2)
    expected = torch.stack([torch.ones(4, 4), MASK])
    assert all(torch.equal(read.mask, expected) for read in subject.denoiser.read)


def test_references_without_masks_hide_nothing():
    subject = fresh_subject(Recording)
    losses(subject, GivenPairs([Pair(MASKED, "sks", B)]), steps=1)
    assert subject.denoiser.read[0].mask is None


def test_reference_pass_reads_its_own_caption_which_is_encoded_once():
    subject = fresh_subject(Recording)
    losses(subject, GivenPairs([Pair(A, "a red sks", B), Pair(B, "sks in snow", A)]), batch_size=2, steps=2)
    assert subject.denoiser.captions == [(REFERENCE_CAPTION,), *[("a red sks", "sks in snow")] * 2]
    expected = subject.denoiser.encode([REFERENCE_CAPTION] * 2).cross_attn
    assert all(torch.equal(read.text.cross_attn, expected) for read in subject.denoiser.read)


# --- Runs that go wrong, or end early


class BreaksAt(TinyDenoiser):
    """Says that the clean picture is not a number, from the third call on."""

    calls = 0

    def denoise(self, noisy, sigma, text, references):
        self.calls += 1
        return super().denoise(noisy, sigma, text, references) * (torch.nan if self.calls >= 3 else 1.0)


def test_loss_that_is_no_number_ends_the_run_and_spares_the_adapter():
    subject = fresh_subject(BreaksAt)
    taken = []
    with pytest.raises(DivergedError, match=r"loss became nan at step 3\. Lower the learning rates"):
        taken.extend((step.number, values(subject)) for step in run(subject, pictures(), steps=5))
    assert [number for number, _ in taken] == [1, 2]
    assert all(torch.equal(tensor, taken[-1][1][name]) for name, tensor in values(subject).items())


def test_gradient_that_is_no_number_ends_the_run_and_spares_the_adapter():
    subject = fresh_subject()
    before = values(subject)
    subject.tokens[0].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(DivergedError, match="gradient became (nan|inf) at step 1"):
        losses(subject, pictures(), steps=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(subject).items())


def test_run_that_is_stopped_leaves_the_steps_that_it_took():
    subject, whole = fresh_subject(), fresh_subject()
    steps = run(subject, pictures(), steps=100)
    stopped = [next(steps).loss, next(steps).loss]
    assert losses(whole, pictures(), steps=2) == stopped
    assert all(torch.equal(tensor, values(whole)[name]) for name, tensor in values(subject).items())
    assert all(parameter.grad is None for parameter in trainables(subject).values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 2, "gradient_accumulation": 2, "reference_dropout": 0.3},
        {"batch_size": 2, "reference_mode": "noised", "weight_decay": 0.5},
        {"loss_scaling": True},
    ],
    ids=["plain", "several pictures a step", "noised", "scaled"],
)
@pytest.mark.parametrize("after", [1, 4])
def test_run_that_goes_on_from_a_file_ends_as_one_that_was_never_stopped(tmp_path, settings, after):
    whole = fresh_subject()
    steps = run(whole, pictures(), steps=6, **settings)
    expected = [step.loss for step in steps]
    last = values(whole)
    steps.apply_average()

    stopped = fresh_subject()
    steps = run(stopped, pictures(), steps=6, **settings)
    list(itertools.islice(steps, after))
    torch.save(steps.state_dict(), tmp_path / "state")

    resumed = fresh_subject()
    steps = run(resumed, pictures(), steps=6, **settings)
    steps.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert [step.number for step in steps] == list(range(after + 1, 7))
    assert steps.losses == expected
    assert all(torch.equal(tensor, last[name]) for name, tensor in values(resumed).items())
    steps.apply_average()
    assert all(torch.equal(tensor, values(whole)[name]) for name, tensor in values(resumed).items())


def test_run_that_failed_within_a_step_goes_on_from_the_step_before(tmp_path):
    whole = fresh_subject()
    expected = losses(whole, pictures(), steps=4, batch_size=2, gradient_accumulation=2)

    failed = fresh_subject(FailsAt)
    steps = run(failed, pictures(), steps=4, batch_size=2, gradient_accumulation=2)
    with pytest.raises(MemoryError):
        list(steps)
    state = steps.state_dict()
    assert len(state["losses"]) == 2

    resumed = fresh_subject()
    steps = run(resumed, pictures(), steps=4, batch_size=2, gradient_accumulation=2)
    steps.load_state_dict(state)
    list(steps)
    assert steps.losses == expected
    assert all(torch.equal(tensor, values(whole)[name]) for name, tensor in values(resumed).items())


class FailsAt(TinyDenoiser):
    """Runs out of memory in the second batch of the third step."""

    calls = 0

    def denoise(self, noisy, sigma, text, references):
        self.calls += 1
        if self.calls == 6:
            raise MemoryError
        return super().denoise(noisy, sigma, text, references)


def test_large_gradients_are_clipped():
    """Adam hides the size of a gradient unless its sizes differ from step to step."""
    subject = fresh_subject()
    seen = {}
    original = torch.nn.utils.clip_grad_norm_
    limit = 1e-3

    def clip(parameters, max_norm):
        parameters = list(parameters)
        norm = original(parameters, max_norm)
        seen["before"], seen["limit"] = norm, max_norm
        seen["after"] = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        seen["count"] = len(parameters)
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        losses(subject, pictures(), steps=1, max_gradient_norm=limit)
    assert seen["before"] > limit and seen["after"] <= limit * 1.001
    assert seen["count"] == len(trainables(subject))


def test_loss_scaling_changes_nothing_in_float32():
    plain, scaled = fresh_subject(), fresh_subject()
    expected = losses(plain, pictures(), steps=3, batch_size=2)
    assert losses(scaled, pictures(), steps=3, batch_size=2, loss_scaling=True) == pytest.approx(expected, rel=1e-5)


def overflowing(factors: Sequence[float]) -> Subject:
    """A subject whose gradients are multiplied by these, one batch after the other."""
    subject, remaining = fresh_subject(Recording), iter(factors)
    subject.tokens[0].register_hook(lambda gradient: gradient * next(remaining))
    return subject


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_scaled_gradient_that_overflows_is_no_step(broken):
    """Neither of the count, nor of the losses, nor of the average."""
    subject = overflowing([broken, 1.0, broken, broken, 1.0, 1.0])
    training = run(subject, pictures(), steps=3, loss_scaling=True, average_power=0.0)
    seen, steps = [], []
    for step in training:
        steps.append(step)
        seen.append(values(subject))
    assert [step.number for step in steps] == [1, 2, 3]
    assert training.losses == [step.loss for step in steps]
    assert training.overflows == 3 and len(subject.denoiser.noised) == 6
    assert all(not torch.equal(a["token"], b["token"]) for a, b in itertools.pairwise(seen))
    training.apply_average()
    for name, tensor in values(subject).items():
        assert torch.allclose(tensor, sum(then[name] for then in seen) / 3, rtol=1e-5, atol=1e-7), name


def test_gradients_that_go_on_overflowing_end_the_run_and_spare_the_adapter():
    subject = overflowing([1.0, *[torch.nan] * 1000])
    training = run(subject, pictures(), steps=30, loss_scaling=True)
    next(training)
    before = values(subject)
    message = (
        r"step 2 the gradients of \d+ batches in a row were no numbers in float16.*Choose the precision bf16 or fp32"
    )
    with pytest.raises(DivergedError, match=message):
        next(training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(subject).items())
    assert len(training.losses) == 1


def test_first_scale_that_is_far_too_high_is_found_out():
    subject = overflowing([*[torch.inf] * 16, 1.0])  # 65536 is 2 to the power of 16
    assert len(losses(subject, pictures(), steps=1, loss_scaling=True)) == 1


def test_run_that_is_stopped_between_overflows_goes_on_as_the_other_would():
    factors = [1.0, torch.inf, torch.inf, 1.0, 1.0]
    whole, stopped = overflowing(factors), overflowing([*factors[:2], 1.0])
    undisturbed = run(whole, pictures(), steps=3, loss_scaling=True)
    expected = [step.loss for step in undisturbed]
    training = run(stopped, pictures(), steps=3, loss_scaling=True)
    next(training)
    denoise, calls = stopped.denoiser.denoise, []

    def break_after_the_first(*args):
        calls.append(args)
        if len(calls) == 2:
            raise InterruptedError
        return denoise(*args)

    stopped.denoiser.denoise = break_after_the_first
    with pytest.raises(InterruptedError):
        next(training)
    resumed = overflowing(factors[1:])
    again = run(resumed, pictures(), steps=3, loss_scaling=True)
    again.load_state_dict(training.state_dict())
    assert [*training.losses, *(step.loss for step in again)] == expected
    assert all(torch.equal(tensor, values(whole)[name]) for name, tensor in values(resumed).items())
    assert again.state_dict()["scaler"] == undisturbed.state_dict()["scaler"]


def test_run_that_goes_on_has_the_scale_that_was_found():
    """Scaling leaves float32 results as they are, so only the scale itself tells."""
    whole, stopped = (run(overflowing([torch.inf, 1.0, 1.0]), pictures(), steps=2, loss_scaling=True) for _ in range(2))
    assert len(list(whole)) == 2 and next(stopped).number == 1
    again = run(overflowing([1.0]), pictures(), steps=2, loss_scaling=True)
    first = again.state_dict()["scaler"]["scale"]
    again.load_state_dict(stopped.state_dict())
    assert next(again).number == 2
    assert again.state_dict()["scaler"] == whole.state_dict()["scaler"]
    assert whole.state_dict()["scaler"]["scale"] < first
