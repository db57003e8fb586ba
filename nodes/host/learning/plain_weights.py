"""Keep weights in memory during a training, on hosts that load each weight when it is used.

With dynamic memory, ComfyUI casts each weight into memory that other weights reuse soon after. Autograd must not keep
views of such memory: the gradient would be computed with overwritten values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# An attribute of modules whose weights the host casts. Without it, the weights are used as they are.
OF_DYNAMIC_MODULES = ("_v", "_prefetch")
ORIGINAL = "_sa_inject_original"  # on a plain weight: the original one, without patches


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether the host loads the weights of this model one by one, when they are used."""
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


@contextlib.contextmanager
def plain_weights(*patchers: ModelPatcher) -> Iterator[None]:
    """Give the modules of dynamic models their own weights on the device, with patches applied.

    Use it outside of inference mode, with the models loaded. It takes as much memory as a full load and reads no file.
    Afterwards every weight is the same object as before. Other models are not changed.
    """
    with contextlib.ExitStack() as undo:
        for patcher in patchers:
            if is_dynamic(patcher):
                undo.enter_context(_plain_weights(patcher))
        yield


@contextlib.contextmanager
def _plain_weights(patcher: ModelPatcher) -> Iterator[None]:
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    hidden: list[tuple[nn.Module, str, Any]] = []
    try:
        for path, module in patcher.model.named_modules():
            for attribute in OF_DYNAMIC_MODULES:
                if attribute in vars(module):
                    hidden.append((module, attribute, vars(module).pop(attribute)))
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    replaced.append((module, name, weight))
                    key = f"{path}.{name}" if path else name
                    module._parameters[name] = _plain(patcher, module, name, key, weight)
        yield
    finally:
        for module, name, weight in replaced:
            module._parameters[name] = weight
        for module, attribute, value in hidden:
            setattr(module, attribute, value)


def _plain(patcher: ModelPatcher, module: nn.Module, name: str, key: str, weight: nn.Parameter) -> nn.Parameter:
    original = patcher.backup[key].weight if key in patcher.backup else weight
    # The model's precision first, then the patches, as in an ordinary load.
    module._parameters[name] = _parameter(_moved(module, name, original, patcher.load_device))
    if key in patcher.patches:
        patched = patcher.patch_weight_to_device(
            key,
            device_to=patcher.load_device,
            return_weight=True,  # type: ignore[reportCallIssue]  # hosts with dynamic memory have it
        )
        module._parameters[name] = _parameter(patched)
    plain = module._parameters[name]
    assert plain is not None
    setattr(plain, ORIGINAL, original)
    return plain


def _moved(module: nn.Module, name: str, weight: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, in the precision that the host chose for the model."""
    if weight.is_meta:  # missing in the file: the host uses zeros
        return torch.zeros(weight.shape, dtype=weight.dtype, device=device)
    is_quantized = type(weight) not in (Tensor, nn.Parameter)
    dtype = None if is_quantized else getattr(module, f"{name}_comfy_model_dtype", None)
    return weight.detach().to(device=device, dtype=dtype or weight.dtype, copy=True)


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)
