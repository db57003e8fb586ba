"""The reference pass while sampling: from image prompts to the keys and values of every injected layer."""

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
    """Run the reference pass for all pictures of an image prompt, and concatenate their keys and values.

    sigma: noise level to which the pictures are noised; None: without noise. Device and dtype are those of `call`.
    -> (1, m, heads*d) for every layer of `blocks`, with m the number of unmasked tokens of all pictures

    As many pictures are encoded at once as fit into memory. Clean references are encoded once, so speed matters little:
    their batches are no larger than the call itself.
    """
    unet_input, missing = call.x, call.foreign.attention
    order = [layer.key for layer in adapter.info.layers if layer.key in blocks and layer.key not in missing]
    parts: dict[BlockKey, list[tuple[int, KV]]] = {key: [] for key in order}
    max_latent_pixels = unet_input.shape[0] * unet_input.shape[-2] * unet_input.shape[-1] if sigma is None else None
    for group in _batches(
        prompt.pictures, adapter, base, unet_input.device, max_latent_pixels if call.rows is None else 0
    ):
        pictures = [prompt.pictures[index] for index in group]
        select = partial(split_per_image, pictures=pictures)
        recorder = KVRecorder(
            order,
            deltas,
            stop_at=order[-1],
            select=select,
            positions=adapter.info.positions,
            narrow_values=is_transformer(base.diffusion_model),
        )
        inputs = reference_inputs(base, adapter, pictures, group, sigma, noise_seed, unet_input)
        blocks = [key for key in adapter.blocks() if key not in missing]
        bank = run_reference_pass(partial(call.read, inputs, recorder.at, blocks), recorder)
        for key in order:
            parts[key].extend(zip(group, bank.pop(key), strict=True))
    return {key: _restore_order(parts.pop(key)) for key in order}


def reference_inputs(
    base: BaseModel,
    adapter: Adapter,
    pictures: Sequence[ReferenceImage],
    indices: Sequence[int],
    sigma: float | None,
    noise_seed: int,
    unet_input: Tensor,
) -> NetworkInputs | TransformerInputs:
    """The network's inputs for pictures of one size. `indices`: of the pictures in the image prompt."""
    latent = base.process_latent_in(torch.cat([p.latent for p in pictures])).to(unet_input.device, torch.float32)
    sampling = base.model_sampling
    level = clean_reference_sigma(sampling) if sigma is None else sigma
    sigmas = torch.full((len(pictures),), level, device=unet_input.device)
    if sigma is not None:
        noise = torch.cat(
            [_noise(picture.latent, noise_seed, index) for picture, index in zip(pictures, indices, strict=True)]
        )
        latent = sampling.noise_scaling(sigmas.view(-1, 1, 1, 1), noise.to(latent), latent)
    text = TextConditioning.stack([picture.text or adapter.class_conditioning for picture in pictures])
    inputs = network_inputs(base, latent, sigmas, text, unet_input.dtype)
    return inputs._replace(x=with_channels(inputs.x, unet_input.shape[1]))


def _noise(latent: Tensor, seed: int, index: int) -> Tensor:
    """The noise of a picture, the same in all steps of a run."""
    generator = torch.Generator().manual_seed((seed + index + 1) % 2**63)
    return torch.randn(latent.shape, generator=generator)


def _batches(
    pictures: Sequence[ReferenceImage],
    adapter: Adapter,
    base: BaseModel,
    device: torch.device,
    max_latent_pixels: int | None,
) -> Iterator[list[int]]:
    """Indices of the pictures of each call: of one size, and as many as fit into memory.

    max_latent_pixels: of all rows of a call together, unless one picture has more; None: no limit.
    """
    for indices in _batchable_groups(pictures, adapter, is_transformer(base.diffusion_model)):
        shape = pictures[indices[0]].latent.shape
        count = (
            len(indices)
            if max_latent_pixels is None
            else min(len(indices), max(1, max_latent_pixels // (shape[-2] * shape[-1])))
        )
        while count > 1 and not fits_in_memory(base, [count, *shape[1:]], device):
            count -= 1
        yield from (indices[first : first + count] for first in range(0, len(indices), count))


def _batchable_groups(pictures: Sequence[ReferenceImage], adapter: Adapter, length_matters: bool) -> list[list[int]]:
    """Groups of indices of pictures that can be rows of one call: of one size, and with compatible lengths of text.

    length_matters: only equal lengths are compatible, because the network's result depends on the length.
    """
    lengths = [(picture.text or adapter.class_conditioning).cross_attn.shape[1] for picture in pictures]
    groups: list[list[int]] = []
    for index, picture in enumerate(pictures):
        for group in groups:
            is_of_size = pictures[group[0]].latent.shape == picture.latent.shape
            together = [lengths[other] for other in (*group, index)]
            if is_of_size and (len(set(together)) == 1 if length_matters else fit_together(together)):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def fits_in_memory(base: BaseModel, shape: Sequence[int], device: torch.device) -> bool:
    """Whether ComfyUI itself would make one call with latents of this shape (b, c, h, w)."""
    return base.memory_required(shape) * 1.5 < get_free_memory(device)


def split_per_image(recorded: ReferenceKV, pictures: Sequence[ReferenceImage]) -> list[KV]:
    """Keys and values of each picture of a batch, without its masked-out tokens. -> (1, m, heads*d) each"""
    size = (recorded.height, recorded.width)
    kept = [None if picture.mask is None else token_mask(picture.mask, *size) for picture in pictures]
    return [select_tokens(recorded.kv, row, tokens) for row, tokens in enumerate(kept)]


def join_images(recorded: ReferenceKV, pictures: Sequence[ReferenceImage]) -> KV:
    """Keys and values of a whole image prompt whose pictures are rows of one call. -> (1, m, heads*d)"""
    return concatenate_kv(split_per_image(recorded, pictures))


def _restore_order(parts: list[tuple[int, KV]]) -> KV:
    return concatenate_kv([kv for _, kv in sorted(parts, key=lambda part: part[0])])


def concatenate_kv(pictures: Sequence[KV]) -> KV:
    """Concatenate the keys and values of pictures, in their order. -> (1, m, heads*d)"""
    return KV(torch.cat([kv.k for kv in pictures], dim=1), torch.cat([kv.v for kv in pictures], dim=1))
