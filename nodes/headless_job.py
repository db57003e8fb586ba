"""One job of a jobs file: a checkpoint, and inputs of the training node and its settings node by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from .host.checkpoints import checkpoint_path, load_checkpoint
from .host.dataset import read_folder
from .host.dataset_files import dataset_folder
from .host.files import read_adapter
from .settings import SAInjectTrainingSettings
from .train import TrainSAInjectAdapter

FOLDERS = ("images", "class_images")  # picture inputs: in the file, the path of a folder
ADAPTERS = ("adapter",)  # adapter inputs: in the file, the name of a file in models/sa_inject
NOT_HERE = ("model", "clip", "vae", "captions", "masks", "settings")  # these come from the checkpoint and the folder


def checked_job(job: dict[str, Any], beside: Path) -> dict[str, Any]:
    """Check a job and add the defaults of all other inputs. Previews are off, because nobody would see them.

    `beside` is the folder that relative paths start from. Raises ValueError, which names the input.
    """
    job = {"previews": 0, **job}
    checkpoint, settings = job.pop("checkpoint", None), job.pop("settings", {})
    if not isinstance(checkpoint, str):
        raise ValueError("it has no checkpoint. Name a file of models/checkpoints.")
    if not isinstance(settings, dict):
        raise ValueError("settings is no table. Write it as [jobs.settings] below the job.")
    checkpoint_path(checkpoint)
    inputs = _checked_inputs(TrainSAInjectAdapter, job, beside)
    if "images" not in inputs:
        raise ValueError("it has no images. Name a folder with pictures of the subject.")
    asked = {name: [settings[name]] for name in ("optimizer", "initial_embedding") if name in settings}
    problem = SAInjectTrainingSettings.validate_inputs(**asked)
    if problem is not True:
        raise ValueError(problem)
    settings = _checked_inputs(SAInjectTrainingSettings, settings, beside)
    return {**inputs, "checkpoint": checkpoint, "settings": settings}


def train_job(job: dict[str, Any]) -> None:
    """Run the training node as ComfyUI runs it. The node saves the adapter."""
    job = dict(job)
    settings = dict(job.pop("settings"))
    with torch.inference_mode():
        if "class_images" in settings:
            folder = settings.pop("class_images")
            settings["class_images"] = read_folder(folder, folder.name, "").images
        (more,) = _execute(SAInjectTrainingSettings, settings)
        model, clip, vae = load_checkpoint(job.pop("checkpoint"))
        folder = job.pop("images")
        dataset = read_folder(folder, folder.name, job["placeholder_token"].strip())
        for name in ADAPTERS:
            if name in job:
                job[name] = read_adapter(job[name])
        pictures = {"images": dataset.images, "captions": dataset.captions, "masks": dataset.masks}
        _execute(TrainSAInjectAdapter, {**job, **pictures, "model": model, "clip": clip, "vae": vae, "settings": more})


def _execute(node: type[io.ComfyNode], inputs: dict[str, Any]) -> tuple[Any, ...]:
    hidden: dict[Any, Any] = {io.Hidden.unique_id: None, io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: {}}
    hidden["hidden_inputs"] = dict(hidden)  # hosts newer than 0.3.75 look for them here
    clone = node.PREPARE_CLASS_CLONE(hidden)
    result = clone.execute(**{name: value if isinstance(value, list) else [value] for name, value in inputs.items()})
    assert not inspect.isawaitable(result)
    return result.args


def _checked_inputs(node: type[io.ComfyNode], given: dict[str, Any], beside: Path) -> dict[str, Any]:
    inputs = {one.id: one for one in node.define_schema().inputs if one.id not in NOT_HERE}
    for name in given:
        if name not in inputs:
            raise ValueError(f"'{name}' is no input of {node.__name__}. It has: {', '.join(sorted(inputs))}.")
    found = {name: one.default for name, one in inputs.items() if getattr(one, "default", None) is not None}
    found.update({name: _checked_value(inputs[name], value, beside) for name, value in given.items()})
    return found


def _checked_value(socket: io.Input, value: Any, beside: Path) -> Any:
    """A value of the file for one input, with the checks that ComfyUI makes for a prompt. Raises ValueError."""
    name = socket.id
    if name in FOLDERS:
        return _folder(name, value, beside)
    kind = {io.Int.Input: int, io.Float.Input: float, io.Boolean.Input: bool}.get(type(socket), str)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; it must be of the type {kind.__name__}.")
    least, most = getattr(socket, "min", None), getattr(socket, "max", None)
    if kind in (int, float) and ((least is not None and value < least) or (most is not None and value > most)):
        raise ValueError(f"{name} is {value}; it must be from {least} to {most}.")
    options = getattr(socket, "options", None)
    if options and value not in options:
        raise ValueError(f"{name} is '{value}'; it is one of {', '.join(map(str, options))}.")
    return value


def _folder(name: str, value: Any, beside: Path) -> Path:
    """A folder relative to the file, by its full path, or inside ComfyUI/input. Raises ValueError."""
    if isinstance(value, str) and (beside / value).is_dir():
        return beside / value
    try:
        return dataset_folder(str(value))
    except ValueError:
        raise ValueError(
            f"{name} is '{value}', which is no folder in {beside} nor in ComfyUI/input. Name a folder with pictures."
        ) from None
