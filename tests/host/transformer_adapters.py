"""Adapters, image prompts and single calls for the tiny diffusion transformers, and the injection written out."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sa_inject.core.adapter import Adapter, AdapterInfo  # pyright: ignore[reportMissingImports]
from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning  # pyright: ignore[reportMissingImports]
from sa_inject.core.lora import SelfAttentionLoRA  # pyright: ignore[reportMissingImports]
from tests.host.adapters import load, random
from tests.host.tiny_transformers import POOLED_WIDTH, TEXT_WIDTH

READ_AT = 0.75  # fraction of the schedule at which clean references are read


def text_for(model: Any, tokens: int, seed: int = 0) -> TextConditioning:
    wants_pooled = model.model.model_config.unet_config.get("vec_in_dim")
    pooled = random(1, POOLED_WIDTH, seed=seed + 1) if wants_pooled else None
    return TextConditioning(random(1, tokens, TEXT_WIDTH, seed=seed), pooled)


def conditioning(model: Any, seed: int, tokens: int = 7) -> list:
    """The output of a text encode node, without the text encoder."""
    text = text_for(model, tokens, seed)
    return [[text.cross_attn, {"pooled_output": text.pooled}]]


def make_adapter(model: Any, positions: str = "none", seed: int = 0, is_fresh: bool = False, mode: str = "clean"):
    """An untrained adapter. Its effect on keys and values is large, unless it is fresh."""
    from sa_inject.nodes.host.networks.registry import describe  # pyright: ignore[reportMissingImports]

    architecture, layers = describe(model)
    with torch.inference_mode(False):
        lora = SelfAttentionLoRA(layers, rank=4, alpha=6.0, generator=torch.Generator().manual_seed(seed))
        if not is_fresh:
            names = list(lora.state_dict())
            values = {
                name: random(*tensor.shape, seed=seed + names.index(name)) * 0.3 if ".lora_B." in name else tensor
                for name, tensor in lora.state_dict().items()
            }
            lora.load_state_dict(values)
    info = AdapterInfo(architecture, layers, 4, 6.0, mode, "<thing>", "thing", positions=positions)
    text = text_for(model, 5, seed + 2)
    return Adapter(f"by-hand-{seed}", info, lora, {"t5xxl": random(1, TEXT_WIDTH)}, text)


def make_prompt(model: Any, *sizes: tuple[int, int], seed: int = 0, masks: tuple[Tensor | None, ...] = ()):
    channels = model.model.latent_format.latent_channels
    pictures = tuple(
        ReferenceImage(random(1, channels, h, w, seed=100 + seed + place), masks[place] if masks else None)
        for place, (h, w) in enumerate(sizes or ((8, 8),))
    )
    return ImagePrompt(pictures)


def apply(host: Any, model: Any, adapter: Adapter, prompt: ImagePrompt | None = None, **widgets) -> Any:
    """The model of our Apply node, at strength 1, from the first step on."""
    host.pack_nodes()
    inputs = {"model": model, "adapter": adapter, "image_prompt": prompt or make_prompt(model), "strength": 1.0}
    return host.execute("ApplySelfAttnInjection", **{**inputs, "start_percent": 0.0, **widgets})[0]


def sample(host: Any, model: Any, *, batch: int = 1, size: tuple[int, int] = (8, 8), **widgets) -> Tensor:
    """Samples of the stock KSampler."""
    inputs = {"positive": conditioning(model, 11, 9), "negative": conditioning(model, 22, 4)}
    latent = {"samples": torch.zeros(batch, model.model.latent_format.latent_channels, *size)}
    widgets = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", **inputs, **widgets}
    return host.execute("KSampler", model=model, latent_image=latent, **widgets)[0]["samples"]


def call(model: Any, x: Tensor, sigma: float, text: TextConditioning, chunks: list[int], **options) -> Tensor:
    """One call as the sampler makes it. x (b, c, h, w). Every row has this text. `chunks` is `cond_or_uncond`."""
    from comfy.patcher_extension import copy_nested_dicts

    base = load(model).model
    given = copy_nested_dicts(model.model_options.get("transformer_options", {}))
    given["wrappers"] = copy_nested_dicts(model.wrappers)
    given |= {"cond_or_uncond": chunks, "sigmas": torch.full((len(x) // len(chunks),), sigma)}
    with torch.inference_mode():
        return base.apply_model(
            x, torch.full((len(x),), sigma), transformer_options={**given, **options}, **conditions(base, x, text)
        )


def conditions(base: Any, x: Tensor, text: TextConditioning, **more) -> dict[str, Any]:
    found = base.extra_conds(noise=x, device=x.device, cross_attn=text.cross_attn, pooled_output=text.pooled, **more)
    return {name: cond.process_cond(batch_size=len(x), area=None).cond for name, cond in found.items()}


@dataclass
class Layer:
    """One attention layer, read from its own linear layer: the picture's tokens, heads split, no positions."""

    z: Tensor  # (b, m, width)
    q: Tensor  # (b, m, heads, d), after the norm of queries
    k: Tensor
    grid: tuple[int, int]


class Written:
    """The injection written out, from inputs and outputs of the layers' linears, for every call of one network."""

    def __init__(self, model: Any) -> None:
        self.model, self.base = model, load(model).model
        self.network = self.base.diffusion_model
        self.is_nextdit = hasattr(self.network, "noise_refiner")
        self.embedder = self.network.rope_embedder if self.is_nextdit else self.network.pe_embedder

    @torch.inference_mode()
    def denoised(
        self,
        x: Tensor,
        sigma: float,
        text: TextConditioning,
        given: list[tuple[Adapter, ImagePrompt, float, Tensor | None]],
        rows: list[int],
    ) -> Tensor:
        """The result of a call whose rows attend to each (adapter, image prompt, strength, mask of queries)."""
        banks = [self.bank(adapter, prompt) for adapter, prompt, *_ in given]

        def attended(place: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            out = softmax_attention(q, k, v)
            tokens = slice(first, first + layer.z.shape[1])
            for (adapter, _, strength, mask), bank in zip(given, banks, strict=True):
                keys, values = bank[place]
                queries = self.rotated(layer.q, layer.grid, 0.0, adapter.info.positions)
                added = softmax_attention(
                    queries.transpose(1, 2), keys.expand(len(x), -1, -1, -1), values.expand(len(x), -1, -1, -1)
                )
                weight = strength if mask is None else strength * mask[:, None]
                for row in rows:
                    out[row, :, tokens] += (weight * added[row]).to(out)
            return out

        return self._run(x, sigma, text, attended)

    def bank(self, adapter: Adapter, prompt: ImagePrompt) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer: (1, heads, tokens of all pictures, d) each."""
        from sa_inject.core.masks import token_mask  # pyright: ignore[reportMissingImports]

        deltas = adapter.lora.deltas(torch.device("cpu"), torch.float32)
        is_distilled = self.base.model_config.unet_config.get("guidance_embed")
        guidance = {"guidance": 1.0} if is_distilled else {}
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for picture in prompt.pictures:
            layers: list[Layer] = []

            def attended(place, layer, q, k, v, first, layers=layers):
                layers.append(layer)
                return softmax_attention(q, k, v)

            latent = self.base.process_latent_in(picture.latent)
            sigma = float(self.base.model_sampling.percent_to_sigma(READ_AT))
            text = picture.text or adapter.class_conditioning
            with torch.inference_mode():
                self._run(latent, sigma, text, attended, **guidance)
            found = []
            for layer, described in zip(layers, adapter.info.layers, strict=True):
                heads = layer.k.shape[2]
                k = layer.k + deltas[described.key, "to_k"](layer.z).unflatten(-1, (heads, -1))
                v = deltas[described.key, "to_v"](layer.z).unflatten(-1, (heads, -1))
                shift = self.index_step() if adapter.info.positions == "index" else 0.0
                k = self.rotated(k, layer.grid, shift, adapter.info.positions)
                kept = slice(None) if picture.mask is None else token_mask(picture.mask, *layer.grid)
                found.append((k[:, kept].transpose(1, 2), v[:, kept].transpose(1, 2)))
            parts.append(found)
        return [
            (torch.cat([k for k, _ in of_layer], dim=2), torch.cat([v for _, v in of_layer], dim=2))
            for of_layer in zip(*parts, strict=True)
        ]

    def index_step(self) -> float:
        return 1.0 if self.is_nextdit else getattr(self.network.params, "ref_index_scale", 1.0)

    def rotated(self, x: Tensor, grid: tuple[int, int], index: float, positions: str) -> Tensor:
        """(b, m, heads, d), rotated by the network itself for a picture on this grid, with this index."""
        if positions == "none":
            return x
        height, width = grid
        ids = torch.zeros(1, height * width, len(self.embedder.axes_dim))
        ids[..., 0] = index
        ids[..., 1] = torch.arange(height).repeat_interleave(width)
        ids[..., 2] = torch.arange(width).repeat(height)
        matrices = self.embedder(ids)[:, 0][:, :, None]
        return (matrices * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2)

    def _run(self, x: Tensor, sigma: float, text: TextConditioning, attended: Any, **more) -> Tensor:
        patch = self.network.patch_size
        grid = (-(-x.shape[-2] // patch), -(-x.shape[-1] // patch))
        m, seen, handles = grid[0] * grid[1], [], []
        given = conditions(self.base, x, text, **more)
        text_tokens = given["c_crossattn"].shape[1]  # some models pad texts

        def watch(linear: Any, norms: tuple[Any, Any], heads: int, width: int, is_picture_alone: bool) -> None:
            def hook(module: Any, inputs: tuple, out: Tensor) -> None:
                n = out.shape[1]
                if self.is_nextdit:
                    multiple = self.network.pad_tokens_multiple or 1
                    first = n - -(-m // multiple) * multiple
                else:
                    first = 0 if is_picture_alone else text_tokens
                q, k = (
                    norm(out[:, first : first + m, part * width : (part + 1) * width].unflatten(-1, (heads, -1)))
                    for part, norm in enumerate(norms)
                )
                seen.append(Layer(inputs[0][:, first : first + m], q, k, grid))

            handles.append(linear.register_forward_hook(hook))

        if self.is_nextdit:
            for block in (*self.network.noise_refiner, *self.network.layers):
                a = block.attention
                watch(a.qkv, (a.q_norm, a.k_norm), a.n_local_heads, a.n_local_heads * a.head_dim, False)
        else:
            for block in self.network.double_blocks:
                norms = (block.img_attn.norm.query_norm, block.img_attn.norm.key_norm)
                watch(block.img_attn.qkv, norms, block.num_heads, block.hidden_size, True)
            for block in self.network.single_blocks:
                watch(
                    block.linear1,
                    (block.norm.query_norm, block.norm.key_norm),
                    block.num_heads,
                    block.hidden_size,
                    False,
                )
        done: list[int] = []

        def override(original: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
            if len(seen) == len(done):  # an attention over text only
                return original(q, k, v, heads, *args, **kwargs)
            place = len(done)
            done.append(place)
            n = q.shape[2]
            first = text_tokens
            if self.is_nextdit:
                multiple = self.network.pad_tokens_multiple or 1
                first = n - -(-m // multiple) * multiple
            out = attended(place, seen[place], q, k, v, first)
            return out.transpose(1, 2).flatten(2).to(q)

        try:
            with torch.inference_mode():
                return self.base.apply_model(
                    x,
                    torch.full((len(x),), sigma),
                    transformer_options={"optimized_attention_override": override},
                    **given,
                )
        finally:
            for handle in handles:
                handle.remove()


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, heads, n, d) each -> (b, heads, n, d)"""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def with_text(prompt: ImagePrompt, texts: list[TextConditioning]) -> ImagePrompt:
    return ImagePrompt(tuple(replace(p, text=t) for p, t in zip(prompt.pictures, texts, strict=True)))
