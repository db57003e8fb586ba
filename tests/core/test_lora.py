"""The LoRA has PEFT's format, gets gradients, and has all its random numbers from one generator."""

import math

import peft
import pytest
import torch

from sa_inject.core.layers import self_attention_layers
from sa_inject.core.lora import LoRADelta, SelfAttentionLoRA
from tests.core.tiny_adapter import ALPHA, RANK, lora_paths, merged, random_lora
from tests.tiny_unet import TinyUNet

LAYERS = self_attention_layers(TinyUNet())


def fresh(seed: int = 0, rank: int = RANK) -> SelfAttentionLoRA:
    return SelfAttentionLoRA(LAYERS, rank, ALPHA, torch.Generator().manual_seed(seed))


def test_keys_and_values_of_every_layer_are_adapted():
    expected = [f"{layer.path}.{name}" for layer in LAYERS for name in ("to_k", "to_v")]
    assert lora_paths(fresh().state_dict()) == expected


def test_number_of_parameters_is_that_of_the_formula():
    per_layer = [2 * RANK * (layer.query_dim + layer.inner_dim) for layer in LAYERS]
    lora = fresh()
    assert sum(parameter.numel() for parameter in lora.parameters()) == sum(per_layer)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in lora.parameters())


def test_fresh_lora_changes_nothing_and_can_learn():
    for name, parameter in fresh().named_parameters():
        assert bool(parameter.any()) == (".lora_A." in name)
    for delta in fresh().deltas(torch.device("cpu"), torch.float32).values():
        assert not delta(torch.randn(2, delta.a.shape[1])).any()


def test_lora_a_is_drawn_as_peft_draws_it():
    unet = TinyUNet()
    config = peft.LoraConfig(r=64, target_modules=lora_paths(fresh().state_dict()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = peft.get_peft_model_state_dict(peft.get_peft_model(unet, config))
    for key, ours in fresh(rank=64).state_dict().items():
        if ".lora_A." in key:
            bound = 1 / math.sqrt(ours.shape[1])
            assert 0.9 * bound < ours.abs().max() <= bound
            torch.testing.assert_close(ours.std(), theirs[key].std(), rtol=0.15, atol=0)


def test_seed_decides_the_numbers_and_nothing_else_does():
    torch_state = torch.get_rng_state()
    first = fresh(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), torch_state)
    torch.rand(5)
    second, other = fresh(seed=3).state_dict(), fresh(seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if ".lora_A." in key)


def test_peft_loads_the_file_keys_and_merges_what_we_mean():
    unet = TinyUNet()
    lora = random_lora(unet)
    paths = lora_paths(lora.state_dict())
    model = peft.get_peft_model(TinyUNet(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths))
    assert set(peft.get_peft_model_state_dict(model)) == set(lora.state_dict())
    result = peft.set_peft_model_state_dict(model, lora.state_dict())
    assert result.unexpected_keys == []
    theirs = model.merge_and_unload().state_dict()
    ours = merged(unet, lora).state_dict()
    assert set(theirs) == set(ours)
    for key, weight in ours.items():
        torch.testing.assert_close(theirs[key], weight)
    for path in paths:
        before = unet.get_submodule(path).weight
        assert (theirs[f"{path}.weight"] - before).norm() > 0.1 * before.norm()


def test_deltas_are_the_scaled_products():
    lora = random_lora(TinyUNet())
    tensors = lora.state_dict()
    deltas = lora.deltas(torch.device("cpu"), torch.float32)
    assert len(deltas) == 2 * len(LAYERS)
    layer = LAYERS[2]
    for projection in ("to_k", "to_v"):
        a, b = (tensors[f"base_model.model.{layer.path}.{projection}.{m}.weight"] for m in ("lora_A", "lora_B"))
        x = torch.randn(2, 3, a.shape[1])
        torch.testing.assert_close(deltas[layer.key, projection](x), ALPHA / RANK * x @ a.T @ b.T)


def test_low_rank_product_takes_one_width_to_another():
    delta = LoRADelta(torch.randn(2, 5), torch.randn(7, 2))
    x = torch.randn(3, 5)
    torch.testing.assert_close(delta(x), x @ (delta.b @ delta.a).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_float32_parameters_from_any_precision(dtype):
    lora = random_lora(TinyUNet())
    deltas = lora.deltas(torch.device("cpu"), dtype)
    outputs = [delta(torch.ones(1, delta.a.shape[1], dtype=dtype)) for delta in deltas.values()]
    assert {output.dtype for output in outputs} == {dtype}
    torch.stack([output.float().square().sum() for output in outputs]).sum().backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()), name


def test_state_goes_round():
    source, target = random_lora(TinyUNet(), seed=1), fresh(seed=2)
    parameters = [id(parameter) for parameter in target.parameters()]
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in source.state_dict().items())
    assert [id(parameter) for parameter in target.parameters()] == parameters  # an optimizer holds on to them
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_moving_keeps_the_parameters_and_leaves_the_skeleton_empty():
    lora = random_lora(TinyUNet())
    before = lora.state_dict()
    assert lora.to(torch.device("cpu")) is lora
    assert all(torch.equal(lora.state_dict()[key], tensor) for key, tensor in before.items())
    empty = [p for name, p in lora.skeleton.named_parameters() if ".lora_" not in name]
    assert len(empty) == len(lora_paths(before)) and all(p.is_meta for p in empty)
