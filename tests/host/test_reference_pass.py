"""The reference pass against projections that have the LoRA merged in, and the injection against its formula.

Keys are those of the merged projection. Values are the difference between the merged and the frozen projection.

The expected values come from a copy of the UNet, called by ComfyUI as any model. It uses nothing of the pack but the
addresses of the self-attention layers.
"""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sa_inject.core.image_prompt import ImagePrompt  # pyright: ignore[reportMissingImports]
from sa_inject.core.kv import KV, BlockKey  # pyright: ignore[reportMissingImports]
from tests.host.adapters import (
    FIRST,
    Spy,
    apply,
    base_model,
    call_unet,
    load,
    make_adapter,
    make_prompt,
    naive_attention,
    random,
    reference_text,
    relative_error,
)
from tests.host.tiny_checkpoints import KINDS

EXACT = 1e-5
SIGMA = 3.0


@torch.inference_mode()
def frozen_copy(model: Any) -> Any:
    """A copy of the loaded BaseModel in float32."""
    base = model.model
    shared = {id(base.model_config): base.model_config}  # which newer hosts do not let be copied
    frozen = copy.deepcopy(base, shared).to(torch.float32)
    frozen.manual_cast_dtype = torch.float32
    return frozen


@torch.inference_mode()
def merged_copy(model: Any, adapter: Any) -> Any:
    """A copy of the loaded BaseModel with alpha / r * B A added to its weights."""
    merged = frozen_copy(model)
    tensors = adapter.lora.state_dict()
    scaling = adapter.info.alpha / adapter.info.rank
    for name in [name for name in tensors if ".lora_A." in name]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        linear = merged.diffusion_model.get_submodule(path)
        product = tensors[name.replace(".lora_A.", ".lora_B.")].double() @ tensors[name].double()
        linear.weight.copy_(linear.weight.double() + scaling * product)
    return merged


@torch.inference_mode()
def keys_and_values(frozen: Any, merged: Any, adapter: Any, latent: Tensor, sigma: float) -> dict[BlockKey, KV]:
    """What the projections make of what the self-attentions read when ComfyUI calls the UNet on one latent."""
    import comfy.sampler_helpers
    import comfy.samplers

    text = adapter.class_conditioning
    entry = {} if text.pooled is None else {"pooled_output": text.pooled}
    (cond,) = comfy.samplers.encode_model_conds(
        frozen.extra_conds,
        comfy.sampler_helpers.convert_cond([[text.cross_attn, entry]]),
        latent,
        latent.device,
        "positive",
        latent_image=latent,
        denoise_mask=None,
    )
    conds = {name: cond.process_cond(batch_size=1, area=None).cond for name, cond in cond["model_conds"].items()}
    read: dict[BlockKey, Tensor] = {}
    hooks = []
    for layer in adapter.info.layers:
        projection = frozen.diffusion_model.get_submodule(layer.path).to_k
        keep = functools.partial(read.__setitem__, layer.key)
        hooks.append(projection.register_forward_pre_hook(lambda module, inputs, keep=keep: keep(inputs[0])))
    frozen.apply_model(latent, torch.tensor([sigma]), **conds)
    for hook in hooks:
        hook.remove()
    paths = {layer.key: layer.path for layer in adapter.info.layers}

    def projections(key: BlockKey, name: str) -> list[Tensor]:
        return [base.diffusion_model.get_submodule(f"{paths[key]}.{name}")(read[key]) for base in (merged, frozen)]

    bank = {}
    for key in paths:
        k, _ = projections(key, "to_k")
        v, without = projections(key, "to_v")
        bank[key] = KV(k, v - without)
    return bank


def expected_bank(model: Any, adapter: Any, prompt: Any) -> dict[BlockKey, KV]:
    """What a clean reference pass hands over: every picture alone, in order."""
    frozen, merged = frozen_copy(model), merged_copy(model, adapter)
    level = float(frozen.model_sampling.percent_to_sigma(0.75))  # a quarter up the schedule
    latents = [frozen.process_latent_in(picture.latent) for picture in prompt.pictures]
    banks = [keys_and_values(frozen, merged, adapter, latent, level) for latent in latents]
    return {
        key: KV(torch.cat([bank[key].k for bank in banks], 1), torch.cat([bank[key].v for bank in banks], 1))
        for key in adapter.blocks()
    }


def call_once(patched: Any, sigma: float = SIGMA, seed: int = 0) -> dict[BlockKey, KV]:
    """Call the patched UNet, loaded already in whatever way, and return the bank that this filled."""
    from sa_inject.nodes.host.drawing.patch import RUN_KEY, SamplingRun  # pyright: ignore[reportMissingImports]

    run = SamplingRun(seed)
    text = reference_text(patched, seed=5)
    conditions = {} if text.pooled is None else {"y": random(1, 2816, seed=6)}
    channels = patched.model.diffusion_model.input_blocks[0][0].in_channels
    if channels > 4:
        conditions["c_concat"] = random(1, channels - 4, 8, 8, seed=7)
    call_unet(patched, random(1, 4, 8, 8, seed=8), sigma, text.cross_attn, [0], conditions, **{RUN_KEY: run})
    (bank,) = run.banks.values()
    return bank


def worst_error(found: dict[BlockKey, KV], expected: dict[BlockKey, KV]) -> float:
    assert list(found) == list(expected)
    return max(relative_error(a, b) for key in expected for a, b in zip(found[key], expected[key], strict=True))


@dataclass
class ReferenceCase:
    model: Any
    adapter: Any
    prompt: Any
    bank: dict[BlockKey, KV]


@pytest.fixture(scope="module")
def case_of(comfy_host):
    """`case_of("sd15")`: a fully loaded model, an adapter, three pictures of two sizes, and the bank to be expected."""

    @functools.cache
    def compute(kind: str) -> ReferenceCase:
        model = load(base_model(comfy_host, kind))
        adapter, prompt = make_adapter(model), make_prompt((8, 8), (8, 16), (8, 8))
        return ReferenceCase(model, adapter, prompt, expected_bank(model, adapter, prompt))

    return compute


@pytest.mark.parametrize("kind", KINDS)
def test_reference_pass_equals_merged_projections_of_the_frozen_pass(comfy_host, case_of, kind):
    case = case_of(kind)
    found = call_once(load(apply(comfy_host, case.model, case.adapter, case.prompt)))
    assert worst_error(found, case.bank) < EXACT


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_injection_equals_its_formula(comfy_host, case_of, kind, strength):
    case = case_of(kind)
    prompt = case.prompt if strength != 1 else ImagePrompt(case.prompt.pictures[:1])
    spy = Spy()
    call_once(load(spy.on(apply(comfy_host, case.model, case.adapter, prompt, strength=strength))))
    assert [a.key for a in spy.attended] == list(case.adapter.blocks())
    for a in spy.attended:
        reference = case.bank[a.key]
        if strength == 1:
            tokens = a.k.shape[1]  # the first picture is as large as the one that is drawn
            reference = KV(reference.k[:, :tokens], reference.v[:, :tokens])
        expected = naive_attention(a.q, KV(a.k, a.v), [(reference, strength)], a.heads)
        assert relative_error(a.out, expected) < EXACT
        assert a.injected_rows() == [0]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_training_reads_a_reference_as_sampling_does(case_of, kind):
    from sa_inject.nodes.host.learning.denoiser import ComfyDenoiser  # pyright: ignore[reportMissingImports]

    case = case_of(kind)
    base, device = case.model.model, case.model.load_device
    sampling = case.model.get_model_object("model_sampling")
    denoiser = ComfyDenoiser(base, sampling, None, case.adapter.info.layers, device, torch.float32)
    latent = base.process_latent_in(case.prompt.pictures[0].latent)
    deltas = case.adapter.lora.deltas(device, torch.float32)
    read = denoiser.read_reference(latent, None, case.adapter.class_conditioning, None, deltas)
    found = {key: reference.kv for key, reference in read.items()}
    first = {key: KV(k[:, : found[key].k.shape[1]], v[:, : found[key].v.shape[1]]) for key, (k, v) in case.bank.items()}
    assert worst_error(found, first) < EXACT


def test_the_lora_of_these_tests_can_be_seen(case_of):
    case = case_of("sd15")
    without = make_adapter(case.model)
    without.lora.load_state_dict({name: 0 * tensor for name, tensor in without.lora.state_dict().items()})
    assert worst_error(expected_bank(load(case.model), without, case.prompt), case.bank) > 0.1


def with_user_lora(model: Any, strength: float = 0.8) -> Any:
    """A LoRA of another pack on self-attention, cross-attention and feed-forward layers."""
    import comfy.sd

    block = "input_blocks.1.1.transformer_blocks.0"
    linears = [f"{block}.{name}" for name in ("attn1.to_k", "attn1.to_v", "attn1.to_q", "attn2.to_k", "ff.net.2")]
    tensors = {}
    for place, path in enumerate(linears):
        out, inner = model.model.diffusion_model.get_submodule(path).weight.shape
        tensors[f"diffusion_model.{path}.lora_up.weight"] = random(out, 2, seed=place) * 0.2
        tensors[f"diffusion_model.{path}.lora_down.weight"] = random(2, inner, seed=10 + place) * 0.2
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)
    assert len(patched.patches) == len(linears)
    return patched


def load_in_part(model: Any, share: float) -> Any:
    """Load as with too little memory: what exceeds this share of the weights is cast when it is needed."""
    with torch.inference_mode():
        model.patch_model(model.load_device, lowvram_model_memory=max(1, int(share * model.model_size())))
    assert model.model.model_lowvram
    return model


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("has_lora", [False, True])
def test_reference_pass_is_exact_when_weights_are_offloaded(comfy_host, has_lora, share):
    unloaded = comfy_host.load_checkpoint("sd15")[0]  # nothing of it is patched by an earlier test
    model = with_user_lora(unloaded) if has_lora else unloaded
    adapter, prompt = make_adapter(model), make_prompt()
    patched = load_in_part(apply(comfy_host, model, adapter, prompt), share)
    assert patched.lowvram_patch_counter() > 0 or not has_lora
    assert worst_error(call_once(patched), expected_bank(patched, adapter, prompt)) < EXACT


def test_reference_pass_reads_through_the_users_lora(comfy_host, own_model):
    adapter, prompt = make_adapter(own_model), make_prompt()
    plain = expected_bank(load(own_model), adapter, prompt)
    for order in (
        lambda: apply(comfy_host, with_user_lora(own_model), adapter, prompt),
        lambda: with_user_lora(apply(comfy_host, own_model, adapter, prompt)),
    ):
        patched = load(order())
        found = call_once(patched)
        assert worst_error(found, expected_bank(patched, adapter, prompt)) < EXACT
        assert worst_error(found, plain) > 0.01


@pytest.mark.parametrize("share", [None, 0.0])
def test_reference_pass_is_exact_over_fp8_storage(comfy_host, share):
    model = comfy_host.load_checkpoint("sd15", model_options={"dtype": torch.float8_e4m3fn})[0]
    assert model.model.diffusion_model.input_blocks[1][1].proj_in.weight.dtype == torch.float8_e4m3fn
    adapter, prompt = make_adapter(model), make_prompt()
    patched = apply(comfy_host, model, adapter, prompt)
    patched = load(patched) if share is None else load_in_part(patched, share)
    assert worst_error(call_once(patched), expected_bank(patched, adapter, prompt)) < EXACT


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("has_area", [False, True])
def test_reference_pass_and_injection_run_in_half_precision(comfy_host, own_model, case_of, dtype, tolerance, has_area):
    adapter, prompt = make_adapter(own_model), ImagePrompt(case_of("sd15").prompt.pictures[::2])
    area = None
    weights: Tensor | float = 1.0
    if has_area:  # the right half
        area = torch.zeros(1, 64, 64)
        area[:, :, 32:] = 1
        weights = area[0, ::8, ::8].flatten()
    spy = Spy(keys=(FIRST,))
    model = spy.on(apply(comfy_host, own_model, adapter, prompt, attn_mask=area, blocks="encoder"))
    model.set_model_compute_dtype(dtype)
    bank = call_once(load(model))
    assert {x.dtype for kv in bank.values() for x in kv} == {dtype}
    for key in bank:  # the tokens of the second picture, which is the third of the prompt of `case_of`
        tokens = bank[key].k.shape[1] // 2
        assert relative_error(bank[key].k[:, tokens:], case_of("sd15").bank[key].k[:, -tokens:]) < tolerance
    (a,) = spy.attended
    assert a.out.dtype == dtype
    expected = naive_attention(a.q, KV(a.k, a.v), [(bank[FIRST], weights)], a.heads)
    assert float(relative_error(a.out, expected)) < tolerance


@pytest.mark.parametrize("kind", ["sd15", "sd2_v", "sdxl"])
def test_matched_mode_reads_the_picture_noised_to_the_step(comfy_host, kind):
    """What the UNet is given is the picture plus one noise, times the sigma of the step; the rest follows from it."""
    model = load(base_model(comfy_host, kind))
    adapter, prompt = make_adapter(model, "noised"), make_prompt()
    patched = load(apply(comfy_host, model, adapter, prompt))
    clean = model.model.process_latent_in(prompt.pictures[0].latent)
    seen: list[Tensor] = []
    first = model.model.diffusion_model.input_blocks[0][0]  # the blocks themselves are never called
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sigmas = (0.7, 5.0)
    banks = [call_once(patched, sigma=sigma, seed=3) for sigma in sigmas]
    call_once(patched, seed=4)
    hook.remove()
    given = [x[-1:] for x in seen]  # the last row of the call that asked for it
    noises = [
        (x[:, :4] * (sigma**2 + 1) ** 0.5 - clean) / sigma for x, sigma in zip(given, (*sigmas, SIGMA), strict=True)
    ]
    assert relative_error(noises[0], noises[1]) < 1e-4  # every step sees the same picture, noised further
    assert (noises[0] - noises[2]).std() > 0.5  # another seed, another noise
    assert 0.8 < noises[0].std() < 1.2
    frozen, merged = frozen_copy(model), merged_copy(model, adapter)
    for sigma, bank in zip(sigmas, banks, strict=True):
        noisy = clean + sigma * noises[0]
        assert worst_error(bank, keys_and_values(frozen, merged, adapter, noisy, sigma)) < 1e-4


@pytest.mark.parametrize("is_watched", [False, True], ids=["in the call that draws", "in a call of its own"])
def test_each_picture_is_noised_by_a_noise_of_its_own(comfy_host, is_watched):
    """Shared noise would be a pattern that all pictures have in common."""
    model = load(base_model(comfy_host, "sd15"))
    prompt = make_prompt((8, 8), (8, 8))
    if is_watched:
        model = model.clone()
        model.set_model_attn2_output_patch(lambda out, options: out)
    patched = load(apply(comfy_host, model, make_adapter(model, "noised"), prompt))
    seen: list[Tensor] = []
    hook = model.model.diffusion_model.input_blocks[0][0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    call_once(patched, sigma=2.0, seed=3)
    hook.remove()
    clean = model.model.process_latent_in(torch.cat([picture.latent for picture in prompt.pictures]))
    given = next(x for x in seen if len(x) >= 2 and (len(x) > 2 or is_watched))[-2:]
    first, second = (given * 5**0.5 - clean) / 2.0
    assert 0.8 < first.std() < 1.2 and 0.8 < second.std() < 1.2
    assert (first - second).std() > 1.0
