"""The reference pass while sampling: image prompts in, keys and values of every injected layer out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from comfy.model_management import get_free_memory
from torch import Tensor

from ....core.adapter import Adapter
from ....core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning, fit_together
from ....core.kv import KV, BlockKey, KVBank
from ....core.lora import LoRADeltas
from ....core.masks import token_mask
from ....core.reference import KVRecorder, ReferenceKV, run_reference_pass, select_tokens
from ..networks.registry import is_transformer, network_inputs
from ..networks.transformers import TransformerInputs
from ..networks.unet import NetworkInputs, clean_reference_sigma
from .reference_call import DrawingCall, with_channels

if TYPE_CHECKING:
    from comfy.model_base import BaseModel


def encode_references(
    call: DrawingCall,
    base: BaseModel,
    adapter: Adapter,
    prompt: ImagePrompt,
    sigma: float | None,
    noise_seed: int,
    blocks: Collection[BlockKey],
    deltas: LoRADeltas,
) -> KVBank:
    """Run the reference pass over an image prompt and line up what its pictures hand over.

    `sigma` None reads the pictures free of noise; a number noises them to it first.
    Device and dtype are those of the call that draws. As many pictures are read at once as there is room for; those
    that are read only once, in calls no larger than that one, for there memory says more than a few launches.
    -> (1, m, heads*d) for every layer of `blocks`, where m counts the kept tokens of all pictures.
    """
    like, missing = call.x, call.foreign.attention
    order = [layer.key for layer in adapter.info.layers if layer.key in blocks and layer.key not in missing]
    parts: dict[BlockKey, list[tuple[int, KV]]] = {key: [] for key in order}
    cells = like.shape[0] * like.shape[-2] * like.shape[-1] if sigma is None else None
    for group in _batches(prompt.pictures, adapter, base, like.device, cells if call.rows is None else 0):
        pictures = [prompt.pictures[place] for place in group]
        select = partial(split_per_image, pictures=pictures)
        recorder = KVRecorder(
            order,
            deltas,
            stop_at=order[-1],
            select=select,
            positions=adapter.info.positions,
            narrow_values=is_transformer(base.diffusion_model),
        )
        inputs = reference_inputs(base, adapter, pictures, group, sigma, noise_seed, like)
        blocks = [key for key in adapter.blocks() if key not in missing]
        bank = run_reference_pass(partial(call.read, inputs, recorder.at, blocks), recorder)
        for key in order:
            parts[key].extend(zip(group, bank.pop(key), strict=True))
    return {key: _restore_order(parts.pop(key)) for key in order}


def reference_inputs(
    base: BaseModel,
    adapter: Adapter,
    pictures: Sequence[ReferenceImage],
    places: Sequence[int],
    sigma: float | None,
    noise_seed: int,
    like: Tensor,
) -> NetworkInputs | TransformerInputs:
    """What the network is called with to read pictures of one size; `places` are theirs in the image prompt."""
    latent = base.process_latent_in(torch.cat([p.latent for p in pictures])).to(like.device, torch.float32)
    sampling = base.model_sampling
    level = clean_reference_sigma(sampling) if sigma is None else sigma
    sigmas = torch.full((len(pictures),), level, device=like.device)
    if sigma is not None:
        noise = torch.cat(
            [_noise(picture.latent, noise_seed, place) for picture, place in zip(pictures, places, strict=True)]
        )
        latent = sampling.noise_scaling(sigmas.view(-1, 1, 1, 1), noise.to(latent), latent)
    text = TextConditioning.stack([picture.text or adapter.class_conditioning for picture in pictures])
    inputs = network_inputs(base, latent, sigmas, text, like.dtype)
    return inputs._replace(x=with_channels(inputs.x, like.shape[1]))


def _noise(latent: Tensor, seed: int, place: int) -> Tensor:
    """One noise per picture and run, so that every step sees the same picture, noised further."""
    generator = torch.Generator().manual_seed((seed + place + 1) % 2**63)
    return torch.randn(latent.shape, generator=generator)


def _batches(
    pictures: Sequence[ReferenceImage], adapter: Adapter, base: BaseModel, device: torch.device, cells: int | None
) -> Iterator[list[int]]:
    """Places of pictures that are read in one call: one size of latent, and no more than fit.

    cells: of latent that a call may have, unless one picture alone has more; None: any number.
    """
    for places in _alike(pictures, adapter, is_transformer(base.diffusion_model)):
        shape = pictures[places[0]].latent.shape
        count = len(places) if cells is None else min(len(places), max(1, cells // (shape[-2] * shape[-1])))
        while count > 1 and not fits_in_memory(base, [count, *shape[1:]], device):
            count -= 1
        yield from (places[first : first + count] for first in range(0, len(places), count))


def _alike(pictures: Sequence[ReferenceImage], adapter: Adapter, length_matters: bool) -> list[list[int]]:
    """Places of pictures that can be rows of one call, in groups: by size, and by lengths of text that go together.

    length_matters: the network notices how long a text is, so that only equal ones do.
    """
    lengths = [(picture.text or adapter.class_conditioning).cross_attn.shape[1] for picture in pictures]
    groups: list[list[int]] = []
    for place, picture in enumerate(pictures):
        for group in groups:
            is_of_size = pictures[group[0]].latent.shape == picture.latent.shape
            together = [lengths[other] for other in (*group, place)]
            if is_of_size and (len(set(together)) == 1 if length_matters else fit_together(together)):
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def fits_in_memory(base: BaseModel, shape: Sequence[int], device: torch.device) -> bool:
    """Whether ComfyUI would itself make one call of latents (b, c, h, w)."""
    return base.memory_required(shape) * 1.5 < get_free_memory(device)


def split_per_image(recorded: ReferenceKV, pictures: Sequence[ReferenceImage]) -> list[KV]:
    """What each picture of a batch hands over, without its masked-out tokens. -> (1, m, heads*d) each"""
    size = (recorded.height, recorded.width)
    kept = [None if picture.mask is None else token_mask(picture.mask, *size) for picture in pictures]
    return [select_tokens(recorded.kv, row, tokens) for row, tokens in enumerate(kept)]


def join_images(recorded: ReferenceKV, pictures: Sequence[ReferenceImage]) -> KV:
    """What the pictures of a whole image prompt hand over at one layer, read as rows of one call. -> (1, m, heads*d)"""
    return concatenate_kv(split_per_image(recorded, pictures))


def _restore_order(parts: list[tuple[int, KV]]) -> KV:
    return concatenate_kv([kv for _, kv in sorted(parts, key=lambda part: part[0])])


def concatenate_kv(pictures: Sequence[KV]) -> KV:
    """Join what pictures hand over, in the order in which they were given. -> (1, m, heads*d)"""
    return KV(torch.cat([kv.k for kv in pictures], dim=1), torch.cat([kv.v for kv in pictures], dim=1))
