"""Real checkpoint files with small contents: the host's loader detects and runs them like downloaded ones.

The rows of a matrix are overlapping windows of one short random vector. So every row is different, and the file has
about ten megabytes and is written in a second. The text encoders have their full size once loaded, because the host's
loader knows no other. `ComfyHost.load_checkpoint` can leave out most of their layers.
"""

import hashlib
import os
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

STRIDE = 17  # distance of two rows in the vector they share
VOCABULARY, CONTEXT_LENGTH = 49408, 77
TIME_CHANNELS = 1280
EMBEDDING_STD = 0.014  # that of OpenAI's CLIP


@dataclass(frozen=True)
class TextEncoder:
    prefix: str
    width: int
    layers: int
    is_openclip: bool = True  # else in the layout of `transformers`


@dataclass(frozen=True)
class Kind:
    """A level of the UNet is the tuple of the depths of its transformers, one for each residual block going down."""

    text_encoders: tuple[TextEncoder, ...]
    context_dim: int
    levels: tuple[tuple[int, ...], ...] = ((1,), (1,))
    output_depths: tuple[int, ...] = (0, 1, 0, 1)
    in_channels: int = 4
    is_linear: bool = True  # proj_in and proj_out of the transformers: linear, or 1x1 convolutions
    adm_channels: int = 0
    latent_scale: float = 0.18215
    is_v_prediction: bool = False


SD15 = Kind(
    text_encoders=(TextEncoder("cond_stage_model.transformer.text_model.", 768, 12, is_openclip=False),),
    context_dim=768,
    is_linear=False,
)
SD2 = Kind(text_encoders=(TextEncoder("cond_stage_model.model.", 1024, 24),), context_dim=1024)
SDXL = Kind(
    text_encoders=(
        TextEncoder("conditioner.embedders.0.transformer.text_model.", 768, 12, is_openclip=False),
        TextEncoder("conditioner.embedders.1.model.", 1280, 32),
    ),
    context_dim=2048,
    levels=((0, 0), (1, 1), (2, 2)),  # the depths of Segmind Vega
    output_depths=(2, 0, 0, 0, 1, 0, 0, 0, 0),
    adm_channels=2816,
    latent_scale=0.13025,
)
KINDS: dict[str, Kind] = {
    "sd15": SD15,
    "sd15_inpaint": replace(SD15, in_channels=9),
    "sd2": SD2,
    "sd2_v": replace(SD2, is_v_prediction=True),
    "sdxl": SDXL,
}


def tiny_checkpoint(kind: str, cache: Path) -> Path:
    """The path of `<kind>.ckpt` below `cache`. It is written unless this version of this file has written it."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    for stale in cache.glob("tiny-*"):
        if stale.name != f"tiny-{version}":
            shutil.rmtree(stale, ignore_errors=True)
    path = cache / f"tiny-{version}" / f"{kind}.ckpt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")  # benches start several hosts at the same time
        torch.save({"state_dict": state_dict(KINDS[kind])}, partial)
        partial.replace(path)
    return path


def state_dict(kind: Kind) -> dict[str, torch.Tensor]:
    weights = Weights()
    write_unet(weights, kind)
    write_vae(weights, kind)
    for encoder in kind.text_encoders:
        write_text_encoder(weights, encoder)
    return dict(weights)  # a file must not contain a class of ours


class Weights(dict[str, torch.Tensor]):
    """Random tensors, each seeded by its name: two kinds of checkpoint have equal tensors under equal names."""

    def vector(self, name: str, n: int, std: float, mean: float = 0.0) -> torch.Tensor:
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(n, dtype=np.float32)
        self[name] = torch.from_numpy(values * std + mean).half()
        return self[name]

    def matrix(self, name: str, *shape: int, std: float) -> None:
        rows, row = shape[0], int(np.prod(shape[1:]))
        inner = torch.empty(shape, device="meta").stride()[1:]
        self[name] = self.vector(name, (rows - 1) * STRIDE + row, std).as_strided(shape, (STRIDE, *inner))

    def layer(self, name: str, *shape: int, gain: float = 1.0, bias: bool = True) -> None:
        """A linear (out, in) or convolution (out, in, k, k) that maps unit variance to `gain` squared."""
        self.matrix(f"{name}.weight", *shape, std=gain / float(np.sqrt(np.prod(shape[1:]))))
        if bias:
            self.vector(f"{name}.bias", shape[0], std=0.02)

    def norm(self, name: str, n: int) -> None:
        self.vector(f"{name}.weight", n, std=0.05, mean=1.0)
        self.vector(f"{name}.bias", n, std=0.05)


def write_unet(weights: Weights, kind: Kind) -> None:
    """320 channels at every level, by which the host knows the architecture. The depths are free."""
    prefix, c = "model.diffusion_model.", 320
    depths = iter(kind.output_depths)
    for name, n_in in (("time_embed", c), ("label_emb.0", kind.adm_channels)):
        if n_in:
            weights.layer(f"{prefix}{name}.0", TIME_CHANNELS, n_in)
            weights.layer(f"{prefix}{name}.2", TIME_CHANNELS, TIME_CHANNELS)

    weights.layer(f"{prefix}input_blocks.0.0", c, kind.in_channels, 3, 3)
    i = 1
    for number, level in enumerate(kind.levels):
        if number > 0:
            weights.layer(f"{prefix}input_blocks.{i}.0.op", c, c, 3, 3)
            i += 1
        for depth in level:
            write_resblock(weights, f"{prefix}input_blocks.{i}.0", c, c)
            write_transformer(weights, f"{prefix}input_blocks.{i}.1", c, depth, kind)
            i += 1

    write_resblock(weights, f"{prefix}middle_block.0", c, c)
    write_transformer(weights, f"{prefix}middle_block.1", c, 1, kind)
    write_resblock(weights, f"{prefix}middle_block.2", c, c)

    i = 0
    for number, level in reversed(list(enumerate(kind.levels))):
        for is_last in [False] * len(level) + [True]:
            depth = next(depths)
            write_resblock(weights, f"{prefix}output_blocks.{i}.0", 2 * c, c)
            write_transformer(weights, f"{prefix}output_blocks.{i}.1", c, depth, kind)
            if is_last and number > 0:
                weights.layer(f"{prefix}output_blocks.{i}.{2 if depth else 1}.conv", c, c, 3, 3)
            i += 1
    weights.norm(f"{prefix}out.0", c)
    weights.layer(f"{prefix}out.2", 4, c, 3, 3)
    if kind.is_v_prediction:  # the host reads the spread of this bias, and nothing else of this block
        weights.vector(f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias", c, std=0.2)


def write_resblock(weights: Weights, name: str, n_in: int, n_out: int) -> None:
    weights.norm(f"{name}.in_layers.0", n_in)
    weights.layer(f"{name}.in_layers.2", n_out, n_in, 3, 3)
    weights.layer(f"{name}.emb_layers.1", n_out, TIME_CHANNELS)
    weights.norm(f"{name}.out_layers.0", n_out)
    weights.layer(f"{name}.out_layers.3", n_out, n_out, 3, 3, gain=0.5)
    if n_in != n_out:
        weights.layer(f"{name}.skip_connection", n_out, n_in, 1, 1)


def write_transformer(weights: Weights, name: str, c: int, depth: int, kind: Kind) -> None:
    if depth == 0:
        return
    kernel = () if kind.is_linear else (1, 1)
    weights.norm(f"{name}.norm", c)
    weights.layer(f"{name}.proj_in", c, c, *kernel)
    weights.layer(f"{name}.proj_out", c, c, *kernel, gain=0.5)
    for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
        for attention, n_in in (("attn1", c), ("attn2", kind.context_dim)):
            weights.layer(f"{block}.{attention}.to_q", c, c, bias=False)
            weights.layer(f"{block}.{attention}.to_k", c, n_in, bias=False)
            weights.layer(f"{block}.{attention}.to_v", c, n_in, bias=False)
            weights.layer(f"{block}.{attention}.to_out.0", c, c)
        weights.layer(f"{block}.ff.net.0.proj", 8 * c, c)
        weights.layer(f"{block}.ff.net.2", c, 4 * c, gain=0.5)
        for norm in ("norm1", "norm2", "norm3"):
            weights.norm(f"{block}.{norm}", c)


def write_vae(weights: Weights, kind: Kind) -> None:
    """The layout of TAESD. Pictures encode to unit variance.

    An untrained eps UNet samples about 20 times that, so the scale below keeps the decoder from saturating. A v UNet
    stays near 1, and its decoder has a larger gain.
    """
    prefix, c, relu = "first_stage_model.", 64, 2**0.5
    weights[f"{prefix}vae_scale"] = torch.tensor(kind.latent_scale / 20)
    weights[f"{prefix}vae_shift"] = torch.tensor(0.0)

    def block(name: str) -> None:
        weights.layer(f"{name}.conv.0", c, c, 3, 3, gain=relu)
        weights.layer(f"{name}.conv.2", c, c, 3, 3, gain=relu)
        weights.layer(f"{name}.conv.4", c, c, 3, 3, gain=0.5)

    encoder, decoder = f"{prefix}taesd_encoder", f"{prefix}taesd_decoder"
    weights.layer(f"{encoder}.0", c, 3, 3, 3, gain=relu)
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(f"{encoder}.{i}")
    for i in (2, 6, 10):
        weights.layer(f"{encoder}.{i}", c, c, 3, 3, bias=False)
    weights.layer(f"{encoder}.14", 4, c, 3, 3)

    weights.layer(f"{decoder}.1", c, 4, 3, 3, gain=relu * (10 if kind.is_v_prediction else 1))
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"{decoder}.{i}")
    for i in (7, 12, 17):
        weights.layer(f"{decoder}.{i}", c, c, 3, 3, bias=False)
    weights.layer(f"{decoder}.19", 3, c, 3, 3, gain=4.0, bias=False)
    weights.vector(f"{decoder}.19.bias", 3, std=0.02, mean=0.5)


def write_text_encoder(weights: Weights, encoder: TextEncoder) -> None:
    """Branches add little to the residual stream, which starts as the token. So every word has an effect."""
    d, gain = encoder.width, 0.2
    if encoder.is_openclip:
        tokens, positions, last_norm = "token_embedding.weight", "positional_embedding", "ln_final"
        layer_name, fc1, fc2, out = "transformer.resblocks", "mlp.c_fc", "mlp.c_proj", "attn.out_proj"
        norms = ("ln_1", "ln_2")
        weights.matrix(f"{encoder.prefix}text_projection", d, d, std=d**-0.5)
    else:
        tokens, positions = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
        last_norm, layer_name, fc1, fc2 = "final_layer_norm", "encoder.layers", "mlp.fc1", "mlp.fc2"
        norms, out = ("layer_norm1", "layer_norm2"), "self_attn.out_proj"

    weights.matrix(encoder.prefix + tokens, VOCABULARY, d, std=EMBEDDING_STD)
    weights.matrix(encoder.prefix + positions, CONTEXT_LENGTH, d, std=EMBEDDING_STD / 2)
    weights.norm(encoder.prefix + last_norm, d)
    for layer in (f"{encoder.prefix}{layer_name}.{i}" for i in range(encoder.layers)):
        for norm in norms:
            weights.norm(f"{layer}.{norm}", d)
        if encoder.is_openclip:
            weights.matrix(f"{layer}.attn.in_proj_weight", 3 * d, d, std=d**-0.5)
            weights.vector(f"{layer}.attn.in_proj_bias", 3 * d, std=0.02)
        else:
            for projection in ("q_proj", "k_proj", "v_proj"):
                weights.layer(f"{layer}.self_attn.{projection}", d, d)
        weights.layer(f"{layer}.{out}", d, d, gain=gain)
        weights.layer(f"{layer}.{fc1}", 4 * d, d)
        weights.layer(f"{layer}.{fc2}", d, 4 * d, gain=gain)
