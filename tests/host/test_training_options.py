"""Each option of SA-Inject Training Settings on the real host: it reaches the training, and its extremes do theirs."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from sa_inject.trainer.optimizers import available_optimizers
from tests.host.test_train import SMALL, Checkpoint, pictures

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sd15(load_checkpoint) -> Checkpoint:
    return Checkpoint(*load_checkpoint("sd15"))


def masks() -> torch.Tensor:
    mask = torch.zeros(3, 64, 64)
    mask[:, :, :40] = 1
    return mask


@pytest.fixture(scope="module")
def trained(comfy_host, pack_nodes, sd15) -> Callable[..., tuple[State, list[float]]]:
    """`trained(flips=True)`: what the node learns with these settings, and the losses of its steps."""

    def train(inputs: dict | None = None, **settings) -> tuple[State, list[float]]:
        (more,) = comfy_host.execute("SAInjectTrainingSettings", **settings)
        given = {"images": pictures(3), "masks": masks(), **SMALL, "steps": 2, "settings": more, **(inputs or {})}
        given = {"lora_learning_rate": 1e-2, "token_learning_rate": 1e-2, "sample_every": 0, **given}
        adapter, _, losses, *_ = comfy_host.execute("TrainSAInjectAdapter", **sd15._asdict(), **given)
        state = {**adapter.lora.state_dict(), **{f"word {k}": v for k, v in adapter.token_embedding.items()}}
        return state, losses["loss"]

    return train


@pytest.fixture(scope="module")
def usual(trained) -> tuple[State, list[float]]:
    return trained()


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def word(state: State) -> torch.Tensor:
    return next(tensor for name, tensor in state.items() if name.startswith("word "))


EACH = [
    {"schedule": "cosine"},
    {"schedule": "linear"},
    {"warmup_steps": 3},
    {"weight_decay": 5.0},
    {"max_gradient_norm": 1e-3},
    {"prior_weight": 1.0},
    {"caption_dropout": 1.0},
    {"horizontal_flips": True},
    {"random_crops": 0.4},
    {"color_jitter": 0.5},
    {"background_weight": 1.0},
    {"min_snr_gamma": 1.0},
    {"keep_token_norm": True},
    {"token_freeze_after": 0.4},
]


@pytest.mark.parametrize("settings", EACH, ids=lambda settings: next(iter(settings)))
def test_option_changes_what_is_learned(trained, usual, settings):
    if "max_gradient_norm" in settings:  # Adam hides a length that is the same in all steps, but for its epsilon
        settings = {"max_gradient_norm": 1e-9}
    found, losses = trained(**settings)
    assert all(torch.isfinite(torch.tensor(losses))) and all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert not same(found, usual[0])


EXTREMES_THAT_ARE_OFF = {
    "background_weight": 0.0,
    "prior_weight": 0.0,
    "caption_dropout": 0.0,
    "token_freeze_after": 1.0,
    "initial_embedding": "class word",
}


def test_the_lowest_values_are_the_training_as_it_is(trained, usual):
    assert same(trained(**EXTREMES_THAT_ARE_OFF)[0], usual[0])


def test_word_that_is_frozen_from_the_start_or_never_read_is_the_class_word(trained):
    frozen, unread = trained(token_freeze_after=0.0)[0], trained(caption_dropout=1.0)[0]
    assert torch.equal(word(frozen), word(unread))
    rows = word(frozen)
    assert torch.equal(rows, rows[:1].expand_as(rows))  # as they begin: equal vectors


def test_word_keeps_its_length(trained):
    kept, start = word(trained(keep_token_norm=True)[0]), word(trained(token_freeze_after=0.0)[0])
    torch.testing.assert_close(kept.norm(dim=-1), start.norm(dim=-1), rtol=2e-3, atol=0)  # float16 in the file
    assert not torch.equal(kept, start)


def test_no_limit_for_gradients_is_as_a_very_high_one(trained):
    assert same(trained(max_gradient_norm=0.0)[0], trained(max_gradient_norm=1000.0)[0])


def test_background_of_full_weight_is_as_without_masks_of_the_loss(trained):
    """Of the first step: the masks still hide parts of the image prompts."""
    first = {"steps": 1, "lora_learning_rate": 0.0, "token_learning_rate": 1e-4}
    whole = trained({"masks": torch.ones(3, 64, 64), **first})[1]
    assert trained(first, background_weight=1.0)[1] == pytest.approx(whole, rel=1e-4)
    assert trained(first)[1] != pytest.approx(whole, rel=1e-4)


def test_prior_of_the_frozen_model_is_silent_before_the_first_step(trained, usual):
    _, losses = trained(prior_weight=10.0)
    assert losses[0] == usual[1][0]  # an untrained LoRA moves nothing
    assert losses[1:] != usual[1][1:]


def test_prior_takes_pictures_of_the_class(comfy_host, trained, usual):
    images = [pictures(2).flip(1), torch.rand(1, 96, 64, 3, generator=torch.Generator().manual_seed(9))]
    found, losses = trained(prior_weight=1.0, class_images=images)
    assert not same(found, usual[0]) and losses[0] > usual[1][0]
    assert not same(found, trained(prior_weight=1.0)[0])
    assert same(trained(class_images=images)[0], usual[0])  # without weight they are not used


def test_single_picture_has_all_augmentations(trained):
    one = {"images": pictures(1), "masks": masks()[:1]}
    plain = trained(one)[0]
    for settings in ({"horizontal_flips": True}, {"random_crops": 0.4}, {"color_jitter": 0.5}):
        assert not same(trained(one, **settings)[0], plain), settings


def test_flips_crops_and_colours_make_the_versions_that_they_name(sd15, comfy_host):
    from sa_inject.nodes.host.images import split_images
    from sa_inject.nodes.host.learning.training_set import Subject, training_set
    from sa_inject.trainer.options import TrainOptions

    def examples(**options):
        with torch.inference_mode():
            given = split_images([pictures(3)], "test")
            subject = Subject(given, list(masks()), None, "sainj", "toy", 64)
            captions = [("sainj",)] * 3
            return training_set(sd15.model, sd15.vae, subject, captions, 0, TrainOptions(**options)).examples

    plain, flipped = examples(), examples(horizontal_flips=True)
    for one, other in zip(plain, flipped, strict=True):
        assert torch.equal(one.latent, other.latent) and not one.as_target and not one.as_reference
        (itself, mirrored), mask = other.as_target, other.mask
        assert torch.equal(itself.latent, one.latent) and torch.equal(itself.mask, mask)
        assert not torch.equal(mirrored.latent, one.latent) and torch.equal(mirrored.mask, mask.flip(-1))
    for one in examples(random_crops=0.5):
        ((large, large_mask),) = one.as_target
        assert large.shape[-2:] == large_mask.shape == (16, 16) and one.latent.shape[-2:] == (8, 8)
        assert not one.as_reference  # image prompts stay whole
    for one in examples(color_jitter=0.5):
        assert not one.as_target and len({version.latent.sum().item() for version in one.as_reference}) == 5
    for one in examples(color_jitter=0.5, horizontal_flips=True, random_crops=0.2):
        assert len(one.as_target) == 2 and len(one.as_reference) == 6


# --- Prodigy


def test_prodigy_is_offered_where_it_is_installed_and_named_where_it_is_not(pack_nodes, monkeypatch):
    node = pack_nodes["SAInjectTrainingSettings"]
    spec = node.INPUT_TYPES()["optional"]["optimizer"]
    offered = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    assert offered == available_optimizers()
    assert "pip install prodigyopt" in spec[1]["tooltip"]
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    assert "pip install prodigyopt" in node.validate_inputs(optimizer=["prodigy"])
    assert node.validate_inputs(optimizer=["adamw"]) is True


@pytest.mark.skipif("prodigy" not in available_optimizers(), reason="prodigyopt is not installed")
def test_prodigy_learns_on_the_host(trained, usual):
    found, losses = trained(optimizer="prodigy")
    assert losses[0] == usual[1][0] and not same(found, usual[0])


# --- An embedding to begin with


@pytest.fixture
def embedding(comfy_host):
    """`embedding("name", tensors)` writes a file into the host's folder."""
    written = []

    def write(name: str, tensors: State) -> str:
        file = comfy_host.base / "models/embeddings" / f"{name}.safetensors"
        save_file(tensors, file)
        written.append(file)
        return file.name

    yield write
    for file in written:
        file.unlink()


def test_word_begins_as_the_embedding_that_is_named(trained, embedding):
    vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(1)) * 0.02
    name = embedding("toy_robot", {"clip_l": vectors})
    found, _ = trained(initial_embedding=name, token_freeze_after=0.0)
    torch.testing.assert_close(word(found), vectors.half().float(), rtol=0, atol=0)
    assert not torch.equal(word(trained(initial_embedding=name)[0]), word(found))  # and learns from there


def test_named_embedding_replaces_the_word_of_the_adapter_to_begin_with(trained, comfy_host, sd15, embedding):
    images = pictures(3)
    adapter = comfy_host.execute("TrainSAInjectAdapter", **sd15._asdict(), images=images, **{**SMALL, "seed": 9})[0]
    vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(2)) * 0.02
    name = embedding("another_robot", {"clip_l": vectors})
    still = {"steps": 1, "lora_learning_rate": 1e-30, "token_learning_rate": 1e-30, "adapter": adapter}
    both, its_own = trained(still, initial_embedding=name), trained(still)
    torch.testing.assert_close(word(both[0]), vectors.half().float(), rtol=0, atol=0)
    assert torch.equal(word(its_own[0]), word({f"word {k}": v for k, v in adapter.token_embedding.items()}))
    for name, tensor in adapter.lora.state_dict().items():
        assert torch.equal(both[0][name], tensor) and torch.equal(its_own[0][name], tensor)
    assert both[1] != its_own[1]


def test_embedding_that_does_not_fit_is_refused_with_what_to_do(trained, embedding):
    with pytest.raises(ValueError, match="no embedding 'gone.safetensors' in ComfyUI/models/embeddings"):
        trained(initial_embedding="gone.safetensors")
    other = embedding("of_sd2", {"clip_h": torch.zeros(2, 1024)})
    with pytest.raises(ValueError, match="'of_sd2.safetensors' holds nothing for the text encoder clip_l"):
        trained(initial_embedding=other)
    long = embedding("long", {"clip_l": torch.zeros(17, 768)})
    with pytest.raises(ValueError, match="has 17 vectors. A word has 1 to 16"):
        trained(initial_embedding=long)


def test_missing_embedding_is_named_before_anything_runs(pack_nodes):
    node = pack_nodes["SAInjectTrainingSettings"]
    assert "no embedding 'gone'" in node.validate_inputs(initial_embedding=["gone"])
    assert node.validate_inputs(initial_embedding=["class word"]) is True
