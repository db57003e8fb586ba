"""Z-Image's network in ComfyUI, NextDiT: its attention layers as sites.

ComfyUI has no hook around a layer of NextDiT. So its attention layers get torch's forward hooks for one call. A hook
gives its layer its own options, and does nothing in calls of other packs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from comfy.ldm.lumina.model import NextDiT
from torch import Tensor, nn

from ....core.kv import BlockKey
from ....core.layers import SelfAttentionLayer
from ....core.positions import Rotation
from ....core.site import AtSite
from .joint_attention import Grid, JointAttention, next_index

if TYPE_CHECKING:
    from comfy.ldm.lumina.model import JointAttention as JointSelfAttention

    from ..host_types import Arguments, Forward, TransformerOptions

STAGES = ("noise_refiner", "layers")  # in the order of execution; both have tokens of the noisy picture
SITES_KEY = "sa_inject_sites"
NEXT_INDEX = 1.0  # along the first axis, as ComfyUI numbers its references


class SiteRequest(NamedTuple):
    """How to compute the attention in one call. It is an entry of the call's options."""

    at: AtSite
    blocks: frozenset[BlockKey]
    grid: Grid
    keeps_hidden: bool


def attention_layers(network: nn.Module) -> tuple[SelfAttentionLayer, ...]:
    """Every attention layer over the picture's tokens."""
    found = []
    for key, path, attention in _attentions(network):
        width = attention.n_local_heads * attention.head_dim
        found.append(SelfAttentionLayer(key, path, attention.qkv.in_features, width))
    return tuple(found)


@contextmanager
def attending(
    network: nn.Module,
    options: TransformerOptions,
    at: AtSite,
    blocks: Collection[BlockKey],
    *,
    size: tuple[int, int],
    keeps_hidden: bool = False,
) -> Iterator[TransformerOptions]:
    """Options for one call of the network, in which `at` computes the attention of these blocks.

    size: of the latent (h, w). The given options are not changed. keeps_hidden: each site has its hidden states.
    """
    request = SiteRequest(at, frozenset(blocks), Grid.of_latent(size, network.patch_size), keeps_hidden)
    with hooked(network):
        yield {**options, SITES_KEY: request}


@contextmanager
def hooked(network: nn.Module) -> Iterator[None]:
    """Register the hooks inside this context. A backward pass that recomputes layers needs them, too."""
    with ExitStack() as undo:
        for key, _, attention in _attentions(network):
            handle = attention.register_forward_pre_hook(_hook(network, key), with_kwargs=True)
            undo.callback(handle.remove)
        yield


def _hook(network: NextDiT, key: BlockKey) -> Forward:
    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments
    ) -> tuple[tuple[Tensor, ...], Arguments] | None:
        options = kwargs.get("transformer_options") or {}
        request = options.get(SITES_KEY)
        if request is None:
            return None
        # Without the entry, so that a second hook on the same layer does nothing.
        options = {name: value for name, value in options.items() if name != SITES_KEY}
        if key in request.blocks:
            hidden, _, freqs = args
            options = _joint_attention(network, key, request, hidden, freqs).options(options)
        return args, {**kwargs, "transformer_options": options}

    return hook


def _joint_attention(
    network: NextDiT, key: BlockKey, request: SiteRequest, hidden: Tensor, freqs: Tensor
) -> JointAttention:
    def rotation(tokens: slice) -> Rotation:
        matrices = freqs[:, tokens, 0]  # (1 or b, m, d/2, 2, 2)
        index_pairs = network.axes_dims[0] // 2
        shift = next_index(network.rope_embedder, len(network.axes_dims), NEXT_INDEX, freqs.device)
        return Rotation(matrices, index_pairs, shift)

    def first(n: int) -> int:
        """The picture is at the end of the sequence, padded to a multiple of tokens."""
        filled = -(-request.grid.tokens // multiple) * multiple
        return n - filled

    multiple = network.pad_tokens_multiple or 1
    return JointAttention(
        at=request.at,
        key=key,
        grid=request.grid,
        first=first,
        rotation=rotation,
        hidden=(lambda tokens: hidden[:, tokens]) if request.keeps_hidden else None,
    )


def _attentions(network: nn.Module) -> Iterator[tuple[BlockKey, str, JointSelfAttention]]:
    for stage in STAGES:
        for index, block in enumerate(getattr(network, stage)):
            yield BlockKey(stage, index), f"{stage}.{index}.attention", block.attention


def is_nextdit(network: nn.Module | None) -> bool:
    return type(network) is NextDiT
