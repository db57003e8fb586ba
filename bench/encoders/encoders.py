"""DINO, CLIP-I and CLIP-T of generated pictures (DreamBooth, Ruiz et al. 2023, section 4.1), with encoders from files.

    dataset/<subject>/*                          real pictures of the subject, as in DreamBench
    generated/<method>/<subject>/*               pictures to score
    generated/<method>/<subject>/prompts.json    {"<name of a picture>": "<its prompt>"}, every picture named

A prompt is the text for CLIP, so it has the class word in place of the placeholder token: "a dog in the jungle".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

METRICS = ("DINO", "CLIP-I", "CLIP-T")
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
BATCH = 16
DINO_RESIZE, DINO_SIDE = 256, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Subject:
    """The pictures of one method for one subject."""

    method: str
    name: str
    prompts: dict[Path, str]  # of the generated pictures
    references: list[Path]


def find_subjects(generated: Path, dataset: Path) -> list[Subject]:
    found = [read_subject(folder, dataset) for method in folders(generated) for folder in folders(method)]
    if not found:
        raise ValueError(f"'{generated}' holds no folders <method>/<subject>.")
    return found


def read_subject(folder: Path, dataset: Path) -> Subject:
    references = dataset / folder.name
    if not references.is_dir():
        raise ValueError(f"The subject of '{folder}' has no references: there is no folder '{references}'.")
    file = folder / "prompts.json"
    generated = pictures_in(folder)
    if not file.is_file():
        raise ValueError(f"There is no '{file}', which gives every picture in that folder its prompt.")
    prompts = json.loads(file.read_text(encoding="utf-8"))
    names = {picture.name for picture in generated}
    for name in sorted(names ^ prompts.keys()):
        lacks = "gives no prompt for" if name in names else "names a picture that is not there:"
        raise ValueError(f"'{file}' {lacks} '{name}'.")
    by_picture = {picture: prompts[picture.name] for picture in generated}
    return Subject(folder.parent.name, folder.name, by_picture, pictures_in(references))


def folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


def pictures_in(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")]
    if not found:
        raise ValueError(f"There are no pictures in '{folder}'.")
    return sorted(found)


class Encoders:
    """CLIP through the host's loaders, which must be importable, and DINO through transformers'.

    Every method returns unit vectors, one for each picture or prompt: (b, d).
    """

    def __init__(self, clip_vision: Path, clip: Path, dino: Path):
        self.clip_vision, self.clip, self.dino = load_clip_vision(clip_vision), load_clip(clip), load_dino(dino)
        widths = self.clip_vision.model.visual_projection.out_features, self.clip_text([""]).shape[1]
        if widths[0] != widths[1]:
            raise ValueError(
                f"'{clip_vision}' embeds pictures in {widths[0]} numbers and '{clip}' prompts in {widths[1]}. "
                "Give the two halves of one CLIP model."
            )

    @torch.inference_mode()
    def clip_image(self, pictures: Sequence[Path]) -> Tensor:
        side = self.clip_vision.image_size
        return embed(pictures, lambda batch: self.clip_vision.encode_image(batch)["image_embeds"], side, side)

    @torch.inference_mode()
    def clip_text(self, prompts: Sequence[str]) -> Tensor:
        def project(prompt: str) -> Tensor:
            tokens = self.clip.tokenize(prompt, disable_weights=True)  # parentheses are text here
            return self.clip.encode_from_tokens(tokens, return_pooled=True)[1]  # (1, d)

        projected = {prompt: project(prompt) for prompt in dict.fromkeys(prompts)}
        return normalize(torch.cat([projected[prompt] for prompt in prompts]).float(), dim=1)

    @torch.inference_mode()
    def dino_image(self, pictures: Sequence[Path]) -> Tensor:
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

        def class_token(batch: Tensor) -> Tensor:
            pixels = ((batch - mean) / std).movedim(-1, 1).to(self.dino.device)  # (b, 3, h, w)
            return self.dino(pixel_values=pixels).last_hidden_state[:, 0].cpu()  # (b, d)

        return embed(pictures, class_token, DINO_RESIZE, DINO_SIDE)


def load_clip_vision(path: Path) -> Any:
    import comfy.clip_vision

    require_key(path, "visual_projection.weight", "visual.proj")
    loaded = comfy.clip_vision.load(str(path))
    if loaded is None:
        raise ValueError(f"'{path}' holds no CLIP image encoder that ComfyUI knows: ViT-L, ViT-H or ViT-bigG.")
    return loaded


def load_clip(path: Path) -> Any:
    """The text encoder. For Stable Diffusion 1, the host leaves out CLIP-L's projection, which CLIP-T needs."""
    import comfy.sd
    from comfy.sd1_clip import SDClipModel

    require_key(path, "text_projection.weight", "text_projection")
    return comfy.sd.load_clip([str(path)], model_options={"clip_l_class": SDClipModel})


def require_key(path: Path, *names: str) -> None:
    """Raise if the projection is missing. The host would use undefined weights instead."""
    import comfy.utils

    keys = comfy.utils.load_torch_file(str(path), safe_load=True).keys()
    if not any(name in keys for name in names):
        raise ValueError(f"'{path}' has no {' or '.join(names)}. Give a CLIP file that was saved with its projection.")


def load_dino(folder: Path) -> Any:
    import comfy.model_management
    from transformers import ViTModel

    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"There is no '{config}': '{folder}' is no model that transformers has saved.")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind != "vit":
        raise ValueError(f"'{folder}' holds a model of type {kind}, and DINO's is vit.")
    model, info = ViTModel.from_pretrained(
        folder, add_pooling_layer=False, local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"'{folder}' lacks weights of its model: {', '.join(sorted(info['missing_keys']))}.")
    return model.eval().float().to(comfy.model_management.get_torch_device())


def embed(pictures: Sequence[Path], encode: Callable[[Tensor], Tensor], resize: int, side: int) -> Tensor:
    """Unit vectors (b, d) of pictures given to `encode` as (b, side, side, 3) in 0..1."""
    found = []
    for i in range(0, len(pictures), BATCH):
        found.append(encode(torch.stack([centre(path, resize, side) for path in pictures[i : i + BATCH]])))
    return normalize(torch.cat(found).float(), dim=1)


def centre(path: Path, resize: int, side: int) -> Tensor:
    """Resize the shorter side to `resize`, then crop the centre: (side, side, 3), as CLIP and DINO do."""
    with Image.open(path) as file:
        picture: Any = ImageOps.exif_transpose(file).convert("RGB")
    resized = transforms.resize(picture, [resize], InterpolationMode.BICUBIC)
    return transforms.to_tensor(transforms.center_crop(resized, [side])).movedim(0, -1)


def score(encoders: Encoders, subject: Subject) -> dict[str, float]:
    """Means over all pairs of a generated and a real picture, and over all pairs of a picture and its prompt."""
    generated = list(subject.prompts)
    clip_image = encoders.clip_image(generated)
    clip_text = encoders.clip_text(list(subject.prompts.values()))
    values = (
        encoders.dino_image(generated) @ encoders.dino_image(subject.references).T,  # (generated, real)
        clip_image @ encoders.clip_image(subject.references).T,  # (generated, real)
        (clip_image * clip_text).sum(dim=1),  # (generated,)
    )
    return {metric: value.mean().item() for metric, value in zip(METRICS, values, strict=True)}
