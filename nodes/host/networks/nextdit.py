"""Z-Image's network in ComfyUI: what it is, and how its attentions are met.

NextDiT has no hook of ComfyUI's around a layer, so its attentions get forward hooks of torch. They are there for the
length of one call, do nothing in calls that are not marked as ours, and give each layer options of its own.
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

STAGES = ("noise_refiner", "layers")  # in the order in which a call meets them; both see the noisy picture
SITES_KEY = "sa_inject_sites"
NEXT_INDEX = 1.0  # along the axis that the text's length and the picture share, as ComfyUI counts its own references


class Wanted(NamedTuple):
    """What a call is to be met with, in its options."""

    at: AtSite
    blocks: frozenset[BlockKey]
    grid: Grid
    keeps_hidden: bool


def attention_layers(network: nn.Module) -> tuple[SelfAttentionLayer, ...]:
    """Every attention over the picture's tokens, by names and sizes alone."""
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

    size: of the latent (h, w). The given options stay as they are.
    """
    wanted = Wanted(at, frozenset(blocks), Grid.of_latent(size, network.patch_size), keeps_hidden)
    with hooked(network):
        yield {**options, SITES_KEY: wanted}


@contextmanager
def hooked(network: nn.Module) -> Iterator[None]:
    """Let marked calls be met, for as long as this lasts: a backward pass may compute layers once more."""
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
        wanted = options.get(SITES_KEY)
        if wanted is None:
            return None
        # Without the mark: another hook of the same kind has nothing left to do.
        options = {name: value for name, value in options.items() if name != SITES_KEY}
        if key in wanted.blocks:
            hidden, _, freqs = args
            options = _met(network, key, wanted, hidden, freqs).options(options)
        return args, {**kwargs, "transformer_options": options}

    return hook


def _met(network: NextDiT, key: BlockKey, wanted: Wanted, hidden: Tensor, freqs: Tensor) -> JointAttention:
    def rotation(tokens: slice) -> Rotation:
        matrices = freqs[:, tokens, 0]  # (1 or b, m, d/2, 2, 2)
        index_pairs = network.axes_dims[0] // 2
        shift = next_index(network.rope_embedder, len(network.axes_dims), NEXT_INDEX, freqs.device)
        return Rotation(matrices, index_pairs, shift)

    def first(n: int) -> int:
        """The picture comes last, filled up to a multiple; before it text, and what others let it see."""
        filled = -(-wanted.grid.tokens // multiple) * multiple
        return n - filled

    multiple = network.pad_tokens_multiple or 1
    return JointAttention(
        at=wanted.at,
        key=key,
        grid=wanted.grid,
        first=first,
        rotation=rotation,
        hidden=(lambda tokens: hidden[:, tokens]) if wanted.keeps_hidden else None,
    )


def _attentions(network: nn.Module) -> Iterator[tuple[BlockKey, str, JointSelfAttention]]:
    for stage in STAGES:
        for index, block in enumerate(getattr(network, stage)):
            yield BlockKey(stage, index), f"{stage}.{index}.attention", block.attention


def is_nextdit(network: nn.Module | None) -> bool:
    return type(network) is NextDiT
