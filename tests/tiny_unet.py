"""A UNet of eighteen thousand parameters with the attribute names of the host's `UNetModel` and its patch protocol.

It copies what a patch can observe (order of calls, arguments, block keys, what is mutated), and not the host's code.
`tests/host/test_harness.py` compares the two. It has two levels of different width, one with two transformer blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IN_CHANNELS = 4
CONTEXT_DIM = 8
ADM_CHANNELS = 6
HEADS = 2
EMBEDDING = 16
WIDTHS = (8, 12)
GROUPS = 4


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """q (b, n, heads*d), k and v (b, m, heads*d) -> (b, n, heads*d); obeys `optimized_attention_override`."""
    options = kwargs.get("transformer_options") or {}
    override = options.get("optimized_attention_override")
    if override is not None and not kwargs.get("_inside_attn_wrapper"):
        return override(attention, q, k, v, heads, mask=mask, **{**kwargs, "_inside_attn_wrapper": True})
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (b, heads, n or m, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context_dim: int):
        super().__init__()
        self.heads, self.dim_head = HEADS, width // HEADS
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x, context=None, value=None, mask=None, transformer_options=None):
        context = x if context is None else context
        value = context if value is None else value
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(value)
        return self.to_out(attention(q, k, v, self.heads, mask, transformer_options=transformer_options))


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.n_heads, self.d_head = HEADS, width // HEADS
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = CrossAttention(width, width)
        self.attn2 = CrossAttention(width, CONTEXT_DIM)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x, context, transformer_options):
        x = x + self.attend("attn1", self.norm1(x), None, transformer_options)
        for patch in transformer_options.get("patches", {}).get("middle_patch", []):
            x = patch(x, self.extra_options(transformer_options))
        x = x + self.attend("attn2", self.norm2(x), context, transformer_options)
        return x + self.ff(self.norm3(x))

    def extra_options(self, transformer_options: dict) -> dict:
        kept = {k: v for k, v in transformer_options.items() if k not in ("patches", "patches_replace")}
        return {**kept, "n_heads": self.n_heads, "dim_head": self.d_head, "attn_precision": None}

    def attend(self, kind: str, n: Tensor, context: Tensor | None, transformer_options: dict) -> Tensor:
        """One attention with its input patches, replacement (3-tuple key first) and output patches."""
        attn: CrossAttention = getattr(self, kind)
        patches = transformer_options.get("patches", {})
        replacements = transformer_options.get("patches_replace", {}).get(kind, {})
        extra_options = self.extra_options(transformer_options)

        value = None
        if f"{kind}_patch" in patches:
            context = n if context is None else context
            value = context
            for patch in patches[f"{kind}_patch"]:
                n, context, value = patch(n, context, value, extra_options)

        block = transformer_options.get("block")
        key = (*block, transformer_options.get("block_index", 0)) if block else None
        replacement = replacements.get(key, replacements.get(block))
        if replacement is None:
            n = attn(n, context=context, value=value, transformer_options=transformer_options)
        else:
            context = n if context is None else context
            value = context if value is None else value
            n = attn.to_out(replacement(attn.to_q(n), attn.to_k(context), attn.to_v(value), extra_options))

        for patch in patches.get(f"{kind}_output_patch", []):
            n = patch(n, extra_options)
        return n


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(width) for _ in range(depth))

    def forward(self, x, context, transformer_options):
        b, c, h, w = x.shape
        transformer_options["activations_shape"] = [b, c, h, w]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (b, h*w, c)
        for i, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = i
            tokens = block(tokens, context=context, transformer_options=transformer_options)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(b, c, h, w)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(GROUPS, width_in), nn.Conv2d(width_in, width, 1)
        self.emb_layers = nn.Linear(EMBEDDING, width)
        self.skip_connection = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x))) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + h


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class TinyUNet(nn.Module):
    """(b, 4, h, w), t (b,), context (b, n, 8) -> (b, 4, h, w). `y` (b, 6) is given if and only if `adm` is."""

    def __init__(self, in_channels: int = IN_CHANNELS, adm: bool = False, seed: int = 0):
        super().__init__()
        a, b = WIDTHS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.in_channels, self.model_channels, self.num_classes = in_channels, a, "sequential" if adm else None
            self.time_embed = nn.Sequential(nn.Linear(a, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
            self.label_emb = nn.Linear(ADM_CHANNELS, EMBEDDING) if adm else None
            self.input_blocks = nn.ModuleList(
                nn.ModuleList(layers)
                for layers in (
                    [nn.Conv2d(in_channels, a, 3, padding=1)],
                    [ResBlock(a, a), SpatialTransformer(a)],
                    [nn.Conv2d(a, a, 3, stride=2, padding=1)],
                    [ResBlock(a, b), SpatialTransformer(b, depth=2)],
                )
            )
            self.middle_block = nn.ModuleList([ResBlock(b, b), SpatialTransformer(b), ResBlock(b, b)])
            self.output_blocks = nn.ModuleList(
                nn.ModuleList(layers)
                for layers in (
                    [ResBlock(b + b, b), SpatialTransformer(b)],
                    [ResBlock(b + a, b), Upsample(b)],
                    [ResBlock(b + a, a), SpatialTransformer(a)],
                    [ResBlock(a + a, a), SpatialTransformer(a)],
                )
            )
            self.out = nn.Sequential(nn.GroupNorm(GROUPS, a), nn.SiLU(), nn.Conv2d(a, IN_CHANNELS, 3, padding=1))

    def forward(self, x, timesteps, context, y=None, control=None, transformer_options=None, **kwargs):
        transformer_options = {} if transformer_options is None else transformer_options  # mutated, as the host does
        assert (y is not None) == (self.num_classes is not None), "y belongs to a class-conditional UNet"
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["transformer_index"] = 0
        half = self.model_channels // 2
        angles = timesteps[:, None].float() * torch.exp(torch.linspace(0, -9, half, device=x.device))
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            transformer_options["block"] = ("input", i)
            h = add_control(run_block(block, h, emb, context, transformer_options), control, "input")
            skips.append(h)
        transformer_options["block"] = ("middle", 0)
        h = add_control(run_block(self.middle_block, h, emb, context, transformer_options), control, "middle")
        for i, block in enumerate(self.output_blocks):
            transformer_options["block"] = ("output", i)
            h = torch.cat([h, add_control(skips.pop(), control, "output")], dim=1)
            size = skips[-1].shape[-2:] if skips else h.shape[-2:]
            h = run_block(block, h, emb, context, transformer_options, size)
        return self.out(h)


def run_block(layers, h, emb, context, transformer_options, size=None) -> Tensor:
    for layer in layers:
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, context, transformer_options)
            transformer_options["transformer_index"] += 1
        elif isinstance(layer, Upsample):
            h = layer(h, size)
        else:
            h = layer(h)
    return h


def add_control(h: Tensor, control: dict | None, name: str) -> Tensor:
    residuals = (control or {}).get(name)
    residual = residuals.pop() if residuals else None
    return h if residual is None else h + residual
