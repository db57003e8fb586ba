"""The Flux family in ComfyUI: Flux.1, Flux.2 and Chroma, which have the same blocks.

ComfyUI allows the replacement of a block, and gives the replacement the original as a function. Ours calls it with
options that override the attention. A replacement by another pack is called inside ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock, apply_mod
from comfy.ldm.flux.model import Flux
from torch import Tensor, nn

from ....core.kv import BlockKey
from ....core.layers import SelfAttentionLayer
from ....core.positions import Rotation
from ....core.site import AtSite
from .joint_attention import Grid, JointAttention, next_index

if TYPE_CHECKING:
    from ..host_types import Arguments, Forward, TransformerOptions

DOUBLE, SINGLE = "double_blocks", "single_blocks"
FluxBlock: TypeAlias = DoubleStreamBlock | SingleStreamBlock
REPLACED_AS = {DOUBLE: "double_block", SINGLE: "single_block"}


def attention_layers(network: nn.Module) -> tuple[SelfAttentionLayer, ...]:
    """Every attention layer. For a double block these are the picture's projections."""
    return tuple(
        SelfAttentionLayer(
            key, f"{DOUBLE}.{key.index}.img_attn" if key.stage == DOUBLE else f"{SINGLE}.{key.index}", n, n
        )
        for key, _ in _blocks(network)
        for n in (network.hidden_size,)
    )


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
    call = Call(network, at, frozenset(blocks), Grid.of_latent(size, network.patch_size), keeps_hidden)
    replaced = options.get("patches_replace", {})
    dit = dict(replaced.get("dit", {}))
    for key, block in _blocks(network):
        name = (REPLACED_AS[key.stage], key.index)
        dit[name] = PatchedBlock(call, key, block, dit.get(name))
    yield {**options, "patches_replace": {**replaced, "dit": dit}}


@dataclass(eq=False)
class Call:
    """Data of one call of the network."""

    network: Flux | Chroma
    at: AtSite
    blocks: frozenset[BlockKey]
    grid: Grid
    keeps_hidden: bool
    text_tokens: int = 0  # set by the double blocks, which run first


@dataclass(frozen=True, eq=False)
class PatchedBlock:
    """A replacement of a block that changes only its attention."""

    call: Call
    key: BlockKey
    block: FluxBlock
    earlier: Forward | None

    def __call__(self, args: Arguments, extra: dict[str, Forward]) -> Arguments:
        if self.key.stage == DOUBLE:
            self.call.text_tokens = args["txt"].shape[1]
        if self.key in self.call.blocks:
            args = {**args, "transformer_options": self._attention(args).options(args["transformer_options"])}
        return extra["original_block"](args) if self.earlier is None else self.earlier(args, extra)

    def _attention(self, args: Arguments) -> JointAttention:
        network, pe, text_tokens = self.call.network, args["pe"], self.call.text_tokens

        def rotation(tokens: slice) -> Rotation:
            params = network.params
            shift = next_index(network.pe_embedder, len(params.axes_dim), index_step(network), pe.device)
            return Rotation(pe[:, 0, tokens], params.axes_dim[0] // 2, shift)

        read = _double_hidden if self.key.stage == DOUBLE else _single_hidden
        return JointAttention(
            at=self.call.at,
            key=self.key,
            grid=self.call.grid,
            first=lambda n: text_tokens,  # the picture follows the text; references of other packs are last
            rotation=rotation,
            hidden=partial(read, self.block, args, text_tokens) if self.call.keeps_hidden else None,
        )


def index_step(network: Flux | Chroma) -> float:
    """The distance of a picture and a reference along the first position axis, as in the model's training."""
    return float(getattr(network.params, "ref_index_scale", 1.0))


def _double_hidden(block: DoubleStreamBlock, args: Arguments, text_tokens: int, tokens: slice) -> Tensor:
    """The hidden states before the picture's projections, computed as in the block. -> (b, m, c)"""
    modulation, _ = block.img_mod(args["vec"]) if block.modulation else args["vec"][0]
    img = args["img"][:, tokens.start - text_tokens : tokens.stop - text_tokens]
    return apply_mod(block.img_norm1(img), 1 + modulation.scale, modulation.shift)


def _single_hidden(block: SingleStreamBlock, args: Arguments, text_tokens: int, tokens: slice) -> Tensor:
    modulation = block.modulation(args["vec"])[0] if block.modulation else args["vec"]
    return apply_mod(block.pre_norm(args["img"][:, tokens]), 1 + modulation.scale, modulation.shift)


def _blocks(network: nn.Module) -> Iterator[tuple[BlockKey, FluxBlock]]:
    for stage in (DOUBLE, SINGLE):
        for index, block in enumerate(getattr(network, stage)):
            yield BlockKey(stage, index), block


def is_flux(network: nn.Module | None) -> bool:
    return type(network) in (Flux, Chroma)


def is_plain(network: Flux | Chroma) -> bool:
    """Whether the inputs are only noise and text: no further channels, and no positions of texts."""
    params = network.params
    further = getattr(params, "yak_mlp", False) or getattr(params, "txt_norm", False)
    return params.in_channels == params.out_channels and not further
