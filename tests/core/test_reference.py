"""The reference pass against projections with merged LoRA: their keys, and the change of their values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sa_inject.core.attention import differentiable_attention
from sa_inject.core.kv import KV, BlockKey
from sa_inject.core.layers import self_attention_layers
from sa_inject.core.lora import SelfAttentionLoRA
from sa_inject.core.reference import (
    KVRecorder,
    ReferenceKV,
    ReferencePassComplete,
    run_reference_pass,
    select_tokens,
)
from tests.core.tiny_adapter import merged, random_lora
from tests.tiny_sites import options_at_sites
from tests.tiny_unet import CONTEXT_DIM, TinyUNet

LAYERS = self_attention_layers(TinyUNet())
BLOCKS = tuple(layer.key for layer in LAYERS)


def unet_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 6, generator=generator)
    return x, torch.tensor([0.0, 400.0]), torch.randn(2, 5, CONTEXT_DIM, generator=generator)


def recorder_for(lora: SelfAttentionLoRA, wanted=BLOCKS, stop_early=True) -> KVRecorder:
    deltas = lora.deltas(torch.device("cpu"), torch.float32)
    return KVRecorder(wanted, deltas, stop_at=wanted[-1] if stop_early else None)


def reference_pass(unet: nn.Module, recorder: KVRecorder) -> dict[BlockKey, ReferenceKV]:
    return run_reference_pass(lambda: call(unet, options_at_sites(BLOCKS, recorder.at)), recorder)


def call(unet: nn.Module, options: dict[str, Any]) -> Tensor:
    return unet(*unet_inputs(), transformer_options=options)


@torch.no_grad()
def plain_pass(unet: nn.Module) -> tuple[dict[BlockKey, Tensor], Tensor]:
    """What the key projection of every self-attention reads, and the output, of a UNet with no other hooks."""
    seen: dict[BlockKey, Tensor] = {}
    hooks = [
        unet.get_submodule(f"{layer.path}.to_k").register_forward_pre_hook(keep(seen, layer.key)) for layer in LAYERS
    ]
    output = call(unet, {})
    for hook in hooks:
        hook.remove()
    return seen, output


def keep(seen: dict[BlockKey, Tensor], key: BlockKey) -> Callable:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (seen[key],) = inputs

    return hook


@torch.no_grad()
def projected(unet: nn.Module, hidden: dict[BlockKey, Tensor]) -> dict[BlockKey, KV]:
    attentions = {layer.key: unet.get_submodule(layer.path) for layer in LAYERS}
    return {key: KV(attentions[key].to_k(x), attentions[key].to_v(x)) for key, x in hidden.items()}


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_reference_pass_hands_over_what_merged_projections_make_of_the_frozen_pass():
    unet = TinyUNet()
    lora = random_lora(unet)
    recorder = recorder_for(lora, stop_early=False)
    output = call(unet, options_at_sites(BLOCKS, recorder.at))
    hidden, expected_output = plain_pass(unet)
    adapted, frozen = projected(merged(unet, lora), hidden), projected(unet, hidden)
    assert tuple(recorder.bank) == BLOCKS
    for key, ((k, v), *_) in recorder.bank.items():
        assert relative_error(k, adapted[key].k) <= 1e-5, key
        assert relative_error(v, adapted[key].v - frozen[key].v) <= 1e-5, key
        assert relative_error(frozen[key].k, adapted[key].k) > 0.05, key  # the LoRA is large enough to be missed
    assert torch.equal(output, expected_output)


@torch.no_grad()
def test_fresh_adapter_hands_over_the_frozen_keys_and_values_of_zero():
    unet = TinyUNet()
    bank = reference_pass(unet, recorder_for(SelfAttentionLoRA(LAYERS, 2, 2.0)))
    expected = projected(unet, plain_pass(unet)[0])
    assert all(torch.equal(bank[key].kv.k, expected[key].k) for key in BLOCKS)
    assert not any(bank[key].kv.v.any() for key in BLOCKS)


@torch.no_grad()
def test_stopping_early_yields_the_same_bank_and_skips_the_rest():
    unet = TinyUNet()
    lora = random_lora(unet)
    wanted = BLOCKS[1:5]
    after = []
    unet.get_submodule(LAYERS[4].path).to_out.register_forward_hook(lambda *_: after.append("to_out"))
    unet.out.register_forward_hook(lambda *_: after.append("out"))
    whole = reference_pass(unet, recorder_for(lora, wanted, stop_early=False))
    assert after == ["to_out", "out"]
    early = reference_pass(unet, recorder_for(lora, wanted))
    assert after == ["to_out", "out"]
    assert tuple(early) == tuple(whole) == wanted
    for key in wanted:
        assert all(torch.equal(x, y) for x, y in zip(early[key].kv, whole[key].kv, strict=True))


def test_stopping_early_ends_the_call_with_an_exception_of_its_own():
    unet = TinyUNet()
    recorder = recorder_for(random_lora(unet))
    with pytest.raises(ReferencePassComplete), torch.no_grad():
        call(unet, options_at_sites(BLOCKS, recorder.at))
    assert tuple(recorder.bank) == BLOCKS


@torch.no_grad()
def test_size_of_a_layer_is_recorded_with_its_tokens():
    bank = reference_pass(TinyUNet(), recorder_for(SelfAttentionLoRA(LAYERS, 2, 2.0)))
    sizes = [(height, width) for _, height, width in bank.values()]
    assert sizes == [(8, 6), (4, 3), (4, 3), (4, 3), (4, 3), (8, 6), (8, 6)]
    widths = [layer.inner_dim for layer in LAYERS]
    for (kv, height, width), inner_dim in zip(bank.values(), widths, strict=True):
        assert kv.k.shape == kv.v.shape == (2, height * width, inner_dim)


def test_gradient_reaches_every_matrix_and_nothing_of_the_pass():
    unet = TinyUNet().requires_grad_(False)
    lora = random_lora(unet)
    recorder = recorder_for(lora, stop_early=False)
    output = call(unet, options_at_sites(BLOCKS, recorder.at))
    assert not output.requires_grad  # so no graph of the pass is kept
    bank = recorder.bank
    generator = torch.Generator().manual_seed(2)
    loss = torch.zeros(())
    for recorded in bank.values():
        for tensor in recorded.kv:
            loss = loss + (tensor * torch.randn(tensor.shape, generator=generator)).sum()
    loss.backward()
    for name, parameter in lora.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 1e-4, name
    assert all(parameter.grad is None for parameter in unet.parameters())


def state_of(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, set[str]], int]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    attributes = {name: set(vars(module)) for name, module in unet.named_modules()}
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}, attributes, hooks


def same_state(one: tuple, other: tuple) -> bool:
    tensors = all(torch.equal(one[0][name], tensor) for name, tensor in other[0].items())
    return tensors and one[0].keys() == other[0].keys() and one[1:] == other[1:]


@pytest.mark.parametrize("fails", [False, True], ids=["success", "exception"])
@torch.no_grad()
def test_nothing_of_a_pass_remains(fails):
    unet = TinyUNet()
    before, output = state_of(unet), call(unet, {})
    calls = []

    def attend(q, k, v, heads):
        calls.append(1)
        if fails and len(calls) == 3:
            raise MemoryError("no room")
        return differentiable_attention(q, k, v, heads)

    recorder = recorder_for(random_lora(unet))
    options = options_at_sites(BLOCKS, recorder.at, attend)
    patches = {name: list(functions) for name, functions in options["patches"].items()}
    replacements = dict(options["patches_replace"]["attn1"])
    if fails:
        with pytest.raises(MemoryError, match="no room"):
            run_reference_pass(lambda: call(unet, options), recorder)
    else:
        run_reference_pass(lambda: call(unet, options), recorder)
    assert options["patches"] == patches and options["patches_replace"] == {"attn1": replacements}
    assert not [key for key in options if str(key).startswith("sa_inject")]  # a tensor here would outlive the pass
    assert same_state(state_of(unet), before)
    assert torch.equal(call(unet, {}), output)


def test_selected_tokens_are_those_of_one_row_that_are_kept():
    kv = KV(torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    kept = torch.tensor([False, True, False, True])
    selected = select_tokens(kv, 1, kept)
    assert torch.equal(selected.k, kv.k[1:2, [1, 3]]) and torch.equal(selected.v, kv.v[1:2, [1, 3]])


def test_without_a_mask_a_row_is_selected_whole():
    kv = KV(torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    selected = select_tokens(kv, 2, None)
    assert torch.equal(selected.k, kv.k[2:]) and torch.equal(selected.v, kv.v[2:])
