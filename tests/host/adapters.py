"""Adapters and image prompts made by hand, and ways to observe a sampling run."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa_inject.core.adapter import Adapter, AdapterInfo  # pyright: ignore[reportMissingImports]
from sa_inject.core.image_prompt import ImagePrompt, ReferenceImage, TextConditioning  # pyright: ignore[reportMissingImports]
from sa_inject.core.kv import KV, BlockKey  # pyright: ignore[reportMissingImports]
from sa_inject.core.lora import SelfAttentionLoRA  # pyright: ignore[reportMissingImports]

TEXT_TOKENS = 7
POOLED = 1280
FIRST = BlockKey("input", 1, 0)  # the first self-attention of the tiny SD1.x and SD2.x checkpoints


@functools.cache
def base_model(host: Any, kind: str) -> Any:
    """The model of a tiny checkpoint, loaded once for the session."""
    return host.load_checkpoint(kind)[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_text(model: Any, seed: int = 0, tokens: int = TEXT_TOKENS) -> TextConditioning:
    config = model.model.model_config.unet_config
    pooled = random(1, POOLED, seed=seed + 1) if config.get("adm_in_channels") else None
    return TextConditioning(random(1, tokens, config["context_dim"], seed=seed), pooled)


def conditioning(model: Any, seed: int, tokens: int = TEXT_TOKENS) -> list:
    """The output of a text encode node, without the text encoder."""
    text = reference_text(model, seed, tokens)
    return [[text.cross_attn, {} if text.pooled is None else {"pooled_output": text.pooled}]]


def make_adapter(model: Any, mode: str = "clean", seed: int = 0) -> Adapter:
    """An untrained adapter with a large effect on keys and values."""
    from sa_inject.nodes.host.networks.unet import describe  # pyright: ignore[reportMissingImports]

    architecture, layers = describe(model)
    with torch.inference_mode(False):
        lora = SelfAttentionLoRA(layers, rank=4, alpha=6.0, generator=torch.Generator().manual_seed(seed))
        values = {
            name: random(*tensor.shape, seed=seed + place) * 0.2 if ".lora_B." in name else tensor
            for place, (name, tensor) in enumerate(lora.state_dict().items())
        }
        lora.load_state_dict(values)
    return Adapter(
        name=f"by-hand-{seed}",
        info=AdapterInfo(
            architecture=architecture,
            layers=layers,
            rank=4,
            alpha=6.0,
            reference_mode=mode,
            placeholder_token="<thing>",
            class_word="thing",
        ),
        lora=lora,
        token_embedding={"clip_l": random(1, 768, seed=seed + 1)},
        class_conditioning=reference_text(model, seed=seed + 2),
    )


def make_prompt(*sizes: tuple[int, int], seed: int = 0, masks: tuple[Tensor | None, ...] = ()) -> ImagePrompt:
    """An image prompt of pictures of these latent sizes, with these masks."""
    pictures = tuple(
        ReferenceImage(random(1, 4, h, w, seed=100 + seed + place), masks[place] if masks else None)
        for place, (h, w) in enumerate(sizes or ((8, 8),))
    )
    return ImagePrompt(pictures)


def apply(host: Any, model: Any, adapter: Adapter | None = None, prompt: ImagePrompt | None = None, **widgets) -> Any:
    """The model of our Apply node, at strength 1.

    It acts from the first step on, because runs of few steps have no late ones.
    """
    host.pack_nodes()
    adapter, prompt = adapter or make_adapter(model), prompt or make_prompt()
    inputs = {"model": model, "adapter": adapter, "image_prompt": prompt, "strength": 1.0, "start_percent": 0.0}
    return host.execute("ApplySelfAttnInjection", **{**inputs, **widgets})[0]


def sample(host: Any, model: Any, *, batch: int = 1, size: tuple[int, int] = (8, 8), **widgets) -> Tensor:
    """Samples of the stock KSampler."""
    inputs = {
        "positive": conditioning(model, 11),
        "negative": conditioning(model, 22),
        "seed": 1,
        "steps": 2,
        "cfg": 4.0,
    }
    latent = {"samples": torch.zeros(batch, 4, *size)}
    return host.execute("KSampler", model=model, latent_image=latent, **(inputs | widgets))[0]["samples"]


@dataclass
class Attended:
    """One self-attention of one UNet call: its arguments and its result."""

    key: BlockKey
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    context: Tensor  # the texts of the call's rows
    sigma: float | None

    @property
    def heads(self) -> int:
        return self.options["n_heads"]

    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def injected_rows(self) -> list[int]:
        """The rows that attended to something besides their own tokens."""
        own = naive_attention(self.q, KV(self.k, self.v), [], self.heads)
        return [row for row in range(len(own)) if not torch.allclose(own[row], self.out[row].double(), atol=1e-4)]

    def rows_that_read(self, cond: list) -> list[int]:
        """The rows whose text is that of a conditioning of one entry."""
        return [row for row, context in enumerate(self.context) if torch.equal(context, cond[0][0][0].to(context))]


@dataclass
class Spy:
    """A wrapper inside ours, which records every UNet call of a run, and every self-attention that is replaced."""

    keys: tuple[BlockKey, ...] | None = None  # only these attentions; None: all
    calls: list[dict[str, Any]] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)

    def on(self, model: Any) -> Any:
        from comfy.patcher_extension import WrappersMP

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "spy", self)
        return model

    def __call__(self, executor, x, timestep, context, y=None, control=None, transformer_options=None, **kwargs):
        options = dict(transformer_options or {})
        self.calls.append({"x": x, "context": context, "options": options})
        replaced = options.get("patches_replace", {})
        attn1 = {key: self.watch(attention, context) for key, attention in replaced.get("attn1", {}).items()}
        options["patches_replace"] = {**replaced, "attn1": attn1}
        return executor(x, timestep, context, y, control, options, **kwargs)

    def watch(self, attention, context: Tensor):
        def watched(q, k, v, options):
            out = attention(q, k, v, options)
            key = BlockKey(*options["block"], options["block_index"])
            if self.keys is None or key in self.keys:
                sigmas = options.get("sigmas")
                sigma = None if sigmas is None else float(sigmas.flatten()[0])
                self.attended.append(Attended(key, q, k, v, out, context, sigma, options))
            return out

        return watched


def call_unet(
    model: Any,
    x: Tensor,
    sigma: float,
    context: Tensor,
    chunks: list[int] | None,
    conditions: dict[str, Tensor] | None = None,
    **options,
) -> Tensor:
    """One call as the sampler makes it, on a model that the caller has loaded. x (b, 4, h, w), context (b, n, width)

    chunks: `cond_or_uncond`; None: not given. conditions: `y` and `c_concat`, if the model wants them. options: go to
    transformer_options.
    """
    from comfy.patcher_extension import copy_nested_dicts

    call = copy_nested_dicts(model.model_options.get("transformer_options", {}))
    call["wrappers"] = copy_nested_dicts(model.wrappers)
    if chunks is not None:
        call |= {"cond_or_uncond": chunks, "sigmas": torch.full((len(x) // len(chunks),), sigma)}
    with torch.inference_mode():
        return model.model.apply_model(
            x,
            torch.full((len(x),), sigma),
            c_crossattn=context,
            transformer_options={**call, **options},
            **(conditions or {}),
        )


def load(model: Any) -> Any:
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    return model


def naive_attention(
    q: Tensor, own: KV, references: list[tuple[KV, Tensor | float]], heads: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v + sum of weight * softmax(q k_r^T / sqrt(d)) v_r, written out.

    A weight is a number, or a tensor with one for each query (n,).
    """
    b, n, width = q.shape

    def split(x: Tensor) -> Tensor:
        return x.to(dtype).expand(b, -1, -1).reshape(b, -1, heads, width // heads).transpose(1, 2)

    out = torch.zeros(b, n, width, dtype=dtype)
    for kv, weight in [(own, 1.0), *references]:
        shares = (split(q) @ split(kv.k).transpose(-1, -2) / (width // heads) ** 0.5).softmax(dim=-1)
        added = (shares @ split(kv.v)).transpose(1, 2).reshape(b, n, width)
        out += torch.as_tensor(weight, dtype=dtype).expand(n)[:, None] * added
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()
