"""Training on hosts that load each weight when it is used, as ComfyUI does on NVIDIA since dynamic memory.

The host's own ModelPatcherDynamic runs here on the CPU. The library beneath it needs CUDA, so three of its parts are
replaced. They are pinned memory, the memory for a weight, and the cast into reused memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.host.evidence import draw, same_bytes, weights_of
from tests.host.trainings import SMALL, Checkpoint, pictures

STYLES = {  # of two layers each, the second of which the host loads at once for its smallness
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v": (320, 320),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (768, 3072),
}


class NoPinnedMemory:
    size = 0

    def __init__(self, *args: Any) -> None: ...


class Vbar:
    """In place of the library's virtual memory: a mark for every weight, and never anything resident."""

    def alloc(self, size: int) -> tuple[str, int, int]:
        return ("mark", 0, size)

    def prioritize(self) -> None: ...

    def free_memory(self, size: float) -> int:
        return 0

    def loaded_size(self) -> int:
        return 0


class SharedBuffer:
    """Casts the weights of dynamic modules into one memory, which the next cast overwrites, as the host does."""

    def __init__(self, original: Callable) -> None:
        self._original = original
        self._memory = torch.empty(0)
        self.casts = 0
        self.casts_for_autograd = 0

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> tuple:
        weight, *rest = self._original(module, *args, **kwargs)
        if hasattr(module, "_v"):
            self.casts += 1
            self.casts_for_autograd += not torch.is_inference_mode_enabled()
            if self._memory.dtype != weight.dtype or self._memory.numel() < weight.numel():
                self._memory = weight.new_empty(max(weight.numel(), 2**22))
            weight = self._memory[: weight.numel()].view(weight.shape).copy_(weight.detach())
        return (weight, *rest)


@pytest.fixture(autouse=True)
def host_with_dynamic_memory(comfy_host) -> None:
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic memory: its class ModelPatcherDynamic is missing")


@pytest.fixture
def buffer(host_with_dynamic_memory, monkeypatch) -> Iterator[SharedBuffer]:
    """Checkpoints that are loaded while it lasts are dynamic."""
    import comfy.model_patcher
    import comfy.ops

    class OnTheCpu(comfy.model_patcher.ModelPatcherDynamic):
        def __new__(cls, *args: Any, **kwargs: Any) -> "OnTheCpu":
            return object.__new__(cls)  # the host itself takes an ordinary one on the CPU

        def _vbar_get(self, create: bool = False) -> Vbar:
            return vbar

        def partially_unload(self, device_to: Any, memory_to_free: float = 0, **kwargs: Any) -> int:
            return self.restore_loaded_backups()

    vbar = Vbar()
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", NoPinnedMemory)
    monkeypatch.setattr("comfy_aimdo.model_vbar.vbar_unpin", lambda mark: None)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", OnTheCpu)
    shared = SharedBuffer(comfy.ops.cast_bias_weight)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", shared)
    yield shared
    import comfy.model_management as model_management

    model_management.unload_all_models()


@pytest.fixture
def train(comfy_host, pack_nodes, forget_trainings) -> Callable[..., tuple[dict[str, torch.Tensor], list[float]]]:
    def run(checkpoint: Checkpoint, **inputs) -> tuple[dict[str, torch.Tensor], list[float]]:
        forget_trainings()  # an ordinary model's training is the same, and would not be done again
        inputs = {"images": pictures(3), **SMALL, "steps": 3, "file_name": "dynamic", **inputs}
        adapter, _, loss_map, *_ = comfy_host.execute("TrainSAInjectAdapter", **checkpoint._asdict(), **inputs)
        return {
            **adapter.lora.state_dict(),
            **adapter.token_embedding,
            "text": adapter.class_conditioning.cross_attn,
        }, loss_map["loss"]

    return run


@pytest.fixture
def styled(comfy_host) -> Callable[[Checkpoint], Checkpoint]:
    """The checkpoint with a user's LoRA on the model and on the text encoder."""

    def style(checkpoint: Checkpoint) -> Checkpoint:
        tensors = {}
        for path, (n_in, n_out) in STYLES.items():
            tensors[f"{path}.lora_up.weight"] = torch.full((n_out, 2), 0.1)
            tensors[f"{path}.lora_down.weight"] = torch.full((2, n_in), 0.1)
        save_file(tensors, comfy_host.base / "models/loras/dynamic.safetensors")
        loaded = {"model": checkpoint.model, "clip": checkpoint.clip, "lora_name": "dynamic.safetensors"}
        return Checkpoint(*comfy_host.execute("LoraLoader", **loaded), checkpoint.vae)

    return style


def notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the host has hung on every module and weight, and the weights that it has not loaded at once."""
    found: dict[str, Any] = {}
    for part, root in (("unet", checkpoint.model.model), ("clip", checkpoint.clip.cond_stage_model)):
        for name, module in root.named_modules():
            found[f"{part} {name}"] = sorted(vars(module))
            found[f"{part} {name} mark"] = vars(module).get("_v")
            for weight_name, weight in module.named_parameters(recurse=False):
                found[f"{part} {name}.{weight_name}"] = (
                    dict(vars(weight)),
                    id(weight) if hasattr(module, "_v") else None,
                )
    return found


@pytest.mark.parametrize(
    "with_lora, inputs",
    [(False, {}), (True, {}), (True, {"precision": "bf16", "steps": 1})],
    ids=["plain", "lora", "bf16"],
)
def test_training_gives_what_it_gives_with_an_ordinary_model(
    request, load_checkpoint, train, styled, with_lora, inputs
):
    ordinary = Checkpoint(*load_checkpoint("sd15"))
    expected = train(styled(ordinary) if with_lora else ordinary, **inputs)

    shared = request.getfixturevalue("buffer")
    dynamic = Checkpoint(*load_checkpoint("sd15"))
    assert dynamic.model.is_dynamic() and dynamic.clip.patcher.is_dynamic()
    trained = styled(dynamic) if with_lora else dynamic
    calls = []
    handle = dynamic.model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = train(trained, **inputs)
    handle.remove()
    assert len(calls) >= len(found[1]) > 0
    assert found[1] == expected[1]
    assert [key for key, tensor in expected[0].items() if not same_bytes(found[0][key], tensor)] == []
    assert any(hasattr(module, "_v") for module in dynamic.model.model.modules())
    assert shared.casts_for_autograd == 0


def test_dynamic_model_draws_the_same_afterwards_and_is_the_same(buffer, load_checkpoint, train, comfy_host):
    dynamic = Checkpoint(*load_checkpoint("sd15"))
    before = draw(comfy_host, dynamic)
    weights, objects = weights_of(dynamic), notes(dynamic)
    assert buffer.casts > 100
    train(dynamic)
    assert notes(dynamic) == objects
    assert all(same_bytes(tensor, weights[name]) for name, tensor in weights_of(dynamic).items())
    assert torch.equal(draw(comfy_host, dynamic), before)


def test_error_in_a_training_leaves_a_dynamic_model_as_it_was(buffer, load_checkpoint, train, comfy_host):
    dynamic = Checkpoint(*load_checkpoint("sd15"))
    before = draw(comfy_host, dynamic)

    def fail(module: Any, args: Any) -> None:
        raise MemoryError

    handle = dynamic.model.model.diffusion_model.out.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        train(dynamic, gradient_checkpointing=True)
    handle.remove()
    assert torch.equal(draw(comfy_host, dynamic), before)


def test_plain_weights_have_the_models_precision_and_not_the_files(buffer, load_checkpoint):
    import comfy.model_management as model_management

    from sa_inject.nodes.host.learning.autograd import make_differentiable, training_mode
    from sa_inject.nodes.host.learning.plain_weights import plain_weights

    model, *_ = load_checkpoint("sd15")
    with torch.inference_mode():
        model_management.load_models_gpu([model])
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_v
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone().float(), requires_grad=False)  # as the file has it
    layer.weight_comfy_model_dtype = torch.float16
    layer.weight._model_dtype = torch.float16
    stored, mark = layer.weight, layer._v
    with training_mode(), plain_weights(model):
        make_differentiable(model.model)
        assert layer.weight.dtype == torch.float16 and torch.equal(layer.weight, stored.half())
        assert layer.weight.data_ptr() != stored.data_ptr()
        assert not hasattr(layer, "_v")
    assert layer.weight is stored and layer._v == mark and stored._model_dtype == torch.float16


def test_fingerprint_does_not_change_from_one_training_to_the_next(buffer, load_checkpoint, train, monkeypatch):
    import sa_inject.nodes.host.learning.training as training

    original, found = training.training_fingerprint, []

    def remember(*args, **kwargs) -> str:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(training, "training_fingerprint", remember)
    dynamic = Checkpoint(*load_checkpoint("sd15"))
    for _ in range(2):
        train(dynamic, steps=1)
    assert found[0] == found[1]
