"""Changes to the host's model during a training: no second set of weights, and the same results."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

LATENT_SIDE = 8


@pytest.fixture(scope="module")
def loaded(load_checkpoint):
    """(model, clip) of SD1.5 as the stock loader leaves them, on their device."""
    import comfy.model_management as model_management

    model, clip, _ = load_checkpoint("sd15")
    with torch.inference_mode():
        model_management.load_models_gpu([model, clip.patcher], force_full_load=True)
    return model, clip


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_differentiable_weights_are_the_same_memory(loaded):
    from sa_inject.nodes.host.learning.autograd import make_differentiable, training_mode

    model, clip = loaded
    for module in (model.model, clip.cond_stage_model):
        before = tensors_of(module)
        with torch.inference_mode():
            values = copies(before)
        with torch.inference_mode(), training_mode():
            make_differentiable(module)
        after = tensors_of(module)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            assert tensor.data_ptr() == before[name].data_ptr() and tensor.stride() == before[name].stride()
            assert not tensor.is_inference() and not tensor.requires_grad
            assert tensor._version >= 0  # autograd can watch it
            assert torch.equal(tensor, values[name])


def test_what_the_host_hangs_on_a_weight_stays_on_it(load_checkpoint):
    from sa_inject.nodes.host.learning.autograd import make_differentiable, training_mode

    base = load_checkpoint("sd15")[0].model
    notes = {}
    for name, tensor in tensors_of(base).items():
        assert tensor.is_inference()
        tensor._model_dtype = notes[name] = torch.float16  # as hosts with dynamic memory do
    with torch.inference_mode(), training_mode():
        make_differentiable(base)
    assert {name: vars(tensor).get("_model_dtype") for name, tensor in tensors_of(base).items()} == notes


def test_the_host_is_told_of_the_training_and_of_its_end(monkeypatch, comfy_host):
    import comfy.model_management as model_management

    from sa_inject.nodes.host.learning.autograd import training_mode

    monkeypatch.setattr(model_management, "in_training", False, raising=False)  # hosts newer than 0.3.75 have it
    with pytest.raises(InterruptedError), torch.inference_mode(), training_mode():
        assert model_management.in_training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        raise InterruptedError
    assert model_management.in_training is False


def test_a_second_call_replaces_nothing(loaded):
    from sa_inject.nodes.host.learning.autograd import make_differentiable, training_mode

    base = loaded[0].model
    with torch.inference_mode(), training_mode():
        make_differentiable(base)
        first = tensors_of(base)
        make_differentiable(base)
    assert all(tensor is first[name] for name, tensor in tensors_of(base).items())


@contextlib.contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd holds on to."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def bytes_beside(kept: dict[int, int], module: torch.nn.Module) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in tensors_of(module).values()}
    return sum(size for storage, size in kept.items() if storage not in own)


def unet_step(base: Any, *contexts: Any) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the context and bytes kept beside the weights, of one call of the UNet."""
    from sa_inject.nodes.host.learning.autograd import differentiable_options, training_mode

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    unet = base.diffusion_model
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), training_mode(), contextlib.ExitStack() as undo:
        for context in contexts:
            undo.enter_context(context)
        x, t, text = random(2, 4, LATENT_SIDE, LATENT_SIDE), torch.tensor([10.0, 700.0]).to(device), random(2, 7, 768)
        text.requires_grad_()
        with kept_bytes() as kept:
            out = unet(x, t, text, None, None, differentiable_options())
        (gradient,) = torch.autograd.grad(out, text, random(*out.shape))
        return out.detach(), gradient, bytes_beside(kept, unet)


def test_frozen_ops_layers_and_activations_compute_the_same_and_keep_less(loaded):
    from sa_inject.nodes.host.learning.autograd import (
        make_differentiable,
        memory_efficient_layers,
        recompute_cheap_ops,
        training_mode,
    )

    base = loaded[0].model
    unet = base.diffusion_model
    with torch.inference_mode(), training_mode():
        make_differentiable(base)
    out, gradient, everything = unet_step(base)
    lean_out, lean_gradient, layers = unet_step(base, memory_efficient_layers(unet))
    assert torch.equal(lean_out, out)
    assert torch.allclose(lean_gradient, gradient, rtol=1e-4, atol=1e-6)
    both_out, both_gradient, both = unet_step(base, memory_efficient_layers(unet), recompute_cheap_ops(unet))
    assert torch.equal(both_out, out)
    assert torch.allclose(both_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert layers < 0.95 * everything and both < 0.75 * everything
    assert [m for m in unet.modules() if "forward" in vars(m)] == []


def test_casting_layers_keep_no_cast_weights(loaded):
    from sa_inject.nodes.host.learning.autograd import make_differentiable, memory_efficient_layers, training_mode

    base = loaded[0].model
    unet = base.diffusion_model
    with torch.inference_mode(), training_mode():
        make_differentiable(base)
    casting = [m for m in unet.modules() if hasattr(m, "comfy_cast_weights")]
    stored = {m: m._parameters.copy() for m in casting}
    try:
        for m in casting:  # as in a model whose computation is wider than its weights
            m.comfy_cast_weights = True
            for name, weight in stored[m].items():
                if weight is not None:
                    m._parameters[name] = torch.nn.Parameter(weight.detach().half(), requires_grad=False)
        out, gradient, everything = unet_step(base)
        lean_out, lean_gradient, lean = unet_step(base, memory_efficient_layers(unet))
    finally:
        for m, parameters in stored.items():
            vars(m).pop("comfy_cast_weights", None)
            m._parameters.update(parameters)
    assert torch.equal(lean_out, out)
    assert torch.allclose(lean_gradient, gradient, rtol=1e-4, atol=1e-6)
    weights = sum(p.nbytes for p in unet.parameters())
    assert everything > 0.8 * weights > 4 * lean


def test_layers_with_patches_or_another_forward_are_left_to_the_host(loaded):
    from sa_inject.nodes.host.learning.autograd import memory_efficient_layers

    base = loaded[0].model
    layer = base.diffusion_model.input_blocks[0][0]
    x = torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE).to(layer.weight.device)
    with torch.no_grad(), memory_efficient_layers(base.diffusion_model):
        plain = layer(x)
        layer.weight_function.append(lambda weight: 2 * weight)
        layer.bias_function.append(lambda bias: 2 * bias)
        try:
            assert torch.allclose(layer(x), 2 * plain, rtol=1e-5, atol=1e-6)
        finally:
            layer.weight_function.clear()
            layer.bias_function.clear()

    def forward(x: Tensor) -> Tensor:
        return x

    layer.forward = forward
    with memory_efficient_layers(base.diffusion_model):
        pass
    assert vars(layer).pop("forward") is forward


@pytest.mark.parametrize("recompute", [True, False])
def test_the_text_encoder_keeps_no_cast_weights_and_few_activations(loaded, recompute):
    from sa_inject.nodes.host.learning.autograd import (
        make_differentiable,
        memory_efficient_layers,
        out_of_place_text_encoder,
        training_mode,
    )
    from sa_inject.nodes.host.text import clip_with_token, encode_text

    _, clip = loaded
    encoder = clip.cond_stage_model
    with torch.inference_mode(), training_mode():
        make_differentiable(encoder)
        word = torch.nn.Parameter(0.01 * torch.randn(1, 768, generator=torch.Generator().manual_seed(0)))
        patched_clip = clip_with_token(clip, "sainj", {"clip_l": word})

        def step() -> tuple[Tensor, Tensor, int]:
            with out_of_place_text_encoder(clip, recompute), kept_bytes() as kept:
                encoded = encode_text(patched_clip, ["a photo of sainj toy", "sainj"]).cross_attn
            (gradient,) = torch.autograd.grad(encoded.square().sum(), word)
            return encoded.detach(), gradient, bytes_beside(kept, encoder)

        with memory_efficient_layers(encoder):
            encoded, gradient, kept = step()
        expected = encode_text(patched_clip, ["a photo of sainj toy", "sainj"]).cross_attn
    gc.collect()
    assert torch.allclose(encoded, expected, atol=1e-6)
    assert gradient.isfinite().all() and gradient.norm() > 0
    layers = len(encoder.clip_l.transformer.text_model.encoder.layers)
    stream = 2 * 77 * 768 * 4  # the hidden states of two texts
    # With recompute, each layer keeps its input only. Otherwise it keeps the inputs of both norms, q, k, v, the
    # attention's result, and the input of the activation, which is four times as wide.
    assert kept < (layers * (1 if recompute else 6 + 4) + 6) * stream
