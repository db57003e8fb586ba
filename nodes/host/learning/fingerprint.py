"""A fingerprint of a training: a hash of everything that the training loop is given, by value.

Inputs are hashed rather than values computed from them, which differ in the last bits on another device. So a training
that ran out of memory can be resumed after a restart with other memory settings.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ....trainer.config import TrainConfig
from ....trainer.examples import Example, TrainingSet
from ....trainer.options import TrainOptions
from ..networks.unet import clean_reference_sigma
from .plain_weights import ORIGINAL

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

    from ..host_types import ModelSampling

FORMAT = 2  # increased if the same inputs train differently, or if the kept files change
DIGITS = 16
# The number of values that are hashed of each weight, evenly spread. It is enough to see another model or a merge, and
# small enough to read SDXL in a fraction of a second. Other tensors are mostly smaller.
WEIGHT_SAMPLES = 128
SAMPLES = 4096
DEPTH = 12  # depth to which objects of other packs are hashed
PROBES = 8  # noise levels at which the model sampling is evaluated


@torch.inference_mode()
def training_fingerprint(
    patcher: ModelPatcher,
    clip: CLIP,
    data: TrainingSet,
    reference_caption: str,
    config: TrainConfig,
    dtype: torch.dtype,
    names: Mapping[str, str],
) -> str:
    """A hexadecimal hash. It is equal for two trainings if, and only if, their steps get the same inputs.

    patcher, clip: loaded; the CLIP has the token embedding from before the first step.
    names: metadata of the finished adapter.
    """
    settings = _settings(config)
    digest = Digest()
    digest.add([FORMAT, torch.__version__, patcher.load_device.type, str(dtype), settings, dict(names)])
    class_pictures = (
        [data.class_pictures] if data.class_pictures else []
    )  # nothing where there are none, as in format 2
    for examples in (data.examples, data.views, *class_pictures):
        digest.add(len(examples))
        for example in examples:
            _add_example(digest, example, clip)
    digest.add([clip.tokenize(reference_caption), clip.layer_idx])
    for values in _sampling_at_probes(patcher.get_model_object("model_sampling")):
        digest.add_whole(values)
    _add_model(digest, patcher, ("model_sampling", "manual_cast_dtype"))  # which are already hashed in another form
    _add_model(digest, clip.patcher, _unused_projections(clip, patcher.model))
    return digest.hexdigest()


def digest_of(module: nn.Module) -> str:
    """A hash of all values of the module's state dict."""
    digest = Digest()
    for key, value in sorted(module.state_dict().items()):
        digest.add(key)
        digest.add_whole(value)
    return digest.hexdigest()


class Digest:
    """A hash of values: numbers, texts, containers, tensors, functions, objects of other packs."""

    def __init__(self, objects: dict[int, tuple[str, object]] | None = None) -> None:
        self._hash = hashlib.sha256()
        # Hashes of objects by id, which is valid for as long as they exist.
        self._objects = {} if objects is None else objects

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:DIGITS]

    def add_whole(self, tensor: Tensor) -> None:
        """Add a tensor with all its values."""
        self._update("whole", tensor.dtype, tuple(tensor.shape))
        self._hash.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())

    def add(self, value: object, depth: int = DEPTH) -> None:
        """Add any value. An object is hashed by class and attributes, a function by its code."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size):
            self._update(type(value).__name__, value)
        elif isinstance(value, Enum):
            self._update("enum", value)
        elif isinstance(value, Tensor):
            self._update("tensor", tuple(value.shape))
            self.add_whole(samples(value, SAMPLES))
        elif depth == 0:
            self._update("deep", type(value).__qualname__)
        elif isinstance(value, Mapping):
            self._update("mapping", len(value))
            for key in sorted(value, key=_name):
                self._update(_name(key))
                self.add(value[key], depth - 1)
        elif isinstance(value, list | tuple):
            self._update("sequence", len(value))
            for item in value:
                self.add(item, depth - 1)
        elif isinstance(value, set | frozenset):
            self._update("set", *sorted(map(_name, value)))
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            self.add(torch.from_numpy(np.ascontiguousarray(value)), depth)
        else:
            self._add_object(value, depth - 1)

    def _add_object(self, value: object, depth: int) -> None:
        if id(value) not in self._objects:
            self._objects[id(value)] = ("part of itself", value)
            whole = Digest(self._objects)
            whole._add_parts(value, depth)
            self._objects[id(value)] = (whole.hexdigest(), value)
        self._update("object", self._objects[id(value)][0])

    def _add_parts(self, value: object, depth: int) -> None:
        if isinstance(value, functools.partial):
            self.add(["partial", value.func, value.args, value.keywords], depth)
        elif isinstance(value, types.MethodType):
            self.add(["method", value.__func__, value.__self__], depth)
        elif isinstance(value, types.FunctionType):
            code = value.__code__
            closure = [_content(cell) for cell in value.__closure__ or ()]
            plain = [constant for constant in code.co_consts if not isinstance(constant, types.CodeType)]
            self._update("function", value.__module__, value.__qualname__, code.co_code.hex())
            self.add([plain, value.__defaults__, value.__kwdefaults__, closure], depth)
        elif isinstance(value, type):
            self._update("class", value.__module__, value.__qualname__)
        else:
            classes = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(value).__mro__)
            self._update("object", getattr(value, "__qualname__", ""), *classes)
            if isinstance(value, nn.Module):
                self.add(dict((*value.named_parameters(), *value.named_buffers())), depth)
            elif not _is_a_patcher(value):
                self.add(getattr(value, "__dict__", None), depth)

    def _update(self, *words: object) -> None:
        self._hash.update(repr([str(word) for word in words]).encode())


def samples(tensor: Tensor, count: int) -> Tensor:
    """About `count` evenly spread values of a tensor, or all of a small one; float32, on its device. -> (n,)"""
    if tensor.is_meta:
        return torch.zeros(0)
    plain = tensor.detach()
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(plain, "dequantize"):
        plain = plain.dequantize()
    flat = plain.flatten()
    if len(flat) > count:
        step = -(-len(flat) // count)
        flat = flat[:: step | 1]  # odd, so that not only a few columns of a matrix are used
    return torch.view_as_real(flat).flatten().float() if flat.is_complex() else flat.float()


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of the steps. Options that are off are left out, so that new options keep old fingerprints."""
    settings = dataclasses.asdict(config)
    if not config.options.depends_on_steps:
        del settings["steps"]  # the total number of steps changes no single step
    usual = dataclasses.asdict(TrainOptions())
    chosen = {name: value for name, value in settings.pop("options").items() if value != usual[name]}
    return {**settings, **chosen}


def _add_example(digest: Digest, example: Example, clip: CLIP) -> None:
    _add_picture(digest, example.latent, example.mask)
    digest.add([[clip.tokenize(caption) for caption in example.captions], example.picture])
    for versions in (example.as_target, example.as_reference):
        if versions:
            digest.add(len(versions))
        for version in versions:
            _add_picture(digest, *version)


def _add_picture(digest: Digest, latent: Tensor, mask: Tensor | None) -> None:
    digest.add_whole(latent)
    if mask is None:
        digest.add(None)
    else:
        digest.add_whole(mask)


def _add_model(digest: Digest, patcher: ModelPatcher, skipped: tuple[str, ...]) -> None:
    """Hash the weights without patches, and the patches, whether they are already applied or not."""
    weights = _weights(patcher, skipped)
    digest.add({name: tuple(weight.shape) for name, weight in weights.items()})
    digest.add_whole(_samples_of_each(weights))
    digest.add(patcher.patches)
    digest.add(patcher.weight_wrapper_patches)
    digest.add({name: patch for name, patch in patcher.object_patches.items() if name not in skipped})
    digest.add(patcher.injections)


def _samples_of_each(weights: Mapping[str, Tensor]) -> Tensor:
    """Samples of weights on several devices. They are joined on each device and moved together."""
    found = {name: samples(weight, WEIGHT_SAMPLES) for name, weight in weights.items()}
    by_device: dict[torch.device, list[str]] = {}
    for name, values in found.items():
        by_device.setdefault(values.device, []).append(name)
    for names in by_device.values():
        parts = [found[name] for name in names]
        found.update(zip(names, torch.cat(parts).cpu().split([len(part) for part in parts]), strict=True))
    return torch.cat([found[name] for name in weights])


def _weights(patcher: ModelPatcher, skipped: tuple[str, ...]) -> dict[str, Tensor]:
    own = dict((*patcher.model.named_parameters(), *patcher.model.named_buffers()))
    originals = {name: getattr(weight, ORIGINAL, weight) for name, weight in own.items()}
    originals.update({name: kept.weight for name, kept in patcher.backup.items() if name in own})
    return {name: originals[name] for name in sorted(own) if not name.startswith(skipped)}


def _unused_projections(clip: CLIP, base: BaseModel) -> tuple[str, ...]:
    """Weights of text encoders that are not used. Many checkpoints lack them; then they are uninitialised memory."""
    read = ("clip_g",) if getattr(base, "adm_channels", 0) else ()
    names = (name for name, _ in clip.cond_stage_model.named_parameters() if "text_projection" in name)
    return tuple(name for name in names if not name.startswith(read))


def _sampling_at_probes(sampling: ModelSampling) -> Iterator[Tensor]:
    """Results of the model sampling for given values. So two classes with the same results are equal."""
    sigmas = sampling.sigmas
    yield sigmas
    yield torch.tensor(clean_reference_sigma(sampling))
    x = torch.linspace(-1.0, 1.0, 4, device=sigmas.device).view(1, 1, 1, 4)
    for index in torch.linspace(0, len(sigmas) - 1, PROBES).long().tolist():
        sigma = sigmas[index : index + 1].clone()
        yield sampling.noise_scaling(sigma.view(1, 1, 1, 1), x.flip(-1), x.clone())
        yield sampling.calculate_input(sigma, x.clone())
        yield sampling.calculate_denoised(sigma, x.flip(-1), x.clone())
        yield sampling.timestep(sigma).float()


def _name(key: object) -> str:
    """A key as text that is the same in another process."""
    return repr(key) if isinstance(key, str | int | float | tuple | Enum) else type(key).__qualname__


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty cell
        return None


def _is_a_patcher(value: object) -> bool:
    return hasattr(value, "patches_uuid") or hasattr(value, "cond_stage_model")
