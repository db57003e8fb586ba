"""What popular packs do to the UNet and to its calls, each mechanism in a few lines of our own.

The docstring of each node names the packs that use it.
"""

import types

import torch
from comfy.conds import CONDRegular
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import nn


def node(**widgets):
    """The attributes of a node class that takes a model and returns one."""

    def decorate(cls):
        cls.INPUT_TYPES = classmethod(lambda _: {"required": {"model": ("MODEL",), **widgets}})
        cls.RETURN_TYPES, cls.FUNCTION, cls.CATEGORY = ("MODEL",), "patch", "probe"
        return cls

    return decorate


ORDERS = ["tiles", "chunks", "one by one", "reversed"]


@node(width=("INT", {"default": 8}), tiles_in_a_call=("INT", {"default": 2}), order=(ORDERS,))
class ProbeTiles:
    """Tiled Diffusion (MultiDiffusion): several tiles in a call, tile by tile, each with all chunks.

    order: `chunks` keeps the tiles of a chunk together. `one by one` calls every chunk of a tile separately.
    """

    def patch(self, model, width, tiles_in_a_call, order):
        def tiled(apply_model, call):
            x, t, c, chunks = call["input"], call["timestep"], call["c"], len(call["cond_or_uncond"])
            out = torch.zeros_like(x)
            starts = list(range(0, x.shape[-1], width))
            for first in range(0, len(starts), tiles_in_a_call):
                places = [slice(start, start + width) for start in starts[first : first + tiles_in_a_call]]
                rows = [[(tile, row) for row in range(len(x))] for tile in places]
                batch = [pair for tile in rows for pair in tile]
                if order == "chunks":
                    size = len(x) // chunks
                    batch = [p for i in range(chunks) for tile in rows for p in tile[i * size : (i + 1) * size]]
                elif order == "reversed":
                    batch = batch[::-1]
                calls = [batch] if order != "one by one" else [[pair] for pair in batch]
                for pairs in calls:
                    picked = [row for _, row in pairs]
                    given = {
                        name: value[picked] if isinstance(value, torch.Tensor) else value for name, value in c.items()
                    }
                    tile = torch.cat([x[row : row + 1, ..., place] for place, row in pairs])
                    found = apply_model(tile, repeat_to_batch_size(t, len(tile)), **given)
                    for (place, row), part in zip(pairs, found, strict=True):
                        out[row, ..., place] = part
            return out

        model = model.clone()
        model.set_model_unet_function_wrapper(tiled)
        return (model,)


class ProbeWiderInput:
    """IC-Light and LayerDiffuse: a first layer with more input channels, and the tensor for them.

    raises: IC-Light's function that replaces `extra_conds` needs a picture.
    """

    @classmethod
    def INPUT_TYPES(cls):
        cond = ("CONDITIONING",)
        channels = ("INT", {"default": 4})
        return {"required": {"model": ("MODEL",), "positive": cond, "negative": cond, "channels": channels}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CONDITIONING", "CONDITIONING"), "patch", "probe"

    def patch(self, model, positive, negative, channels, through="conds"):
        model = model.clone()
        key = "diffusion_model.input_blocks.0.0.weight"
        weight = model.model.diffusion_model.input_blocks[0][0].weight
        generator = torch.Generator().manual_seed(3)
        added = torch.zeros(weight.shape[0], 4 + channels, *weight.shape[2:])
        added[:, 4:] = torch.randn(added[:, 4:].shape, generator=generator) * 0.02
        model.add_patches({key: ("diff", [added, {"pad_weight": True}])})
        further = torch.randn(1, channels, 8, 8, generator=generator)
        if through == "conds":
            entry = {"model_conds": {"c_concat": CONDRegular(further)}}
            given = [[[text, {**options, **entry}] for text, options in cond] for cond in (positive, negative)]
            return (model, *given)

        def extra_conds(self, **kwargs):
            image = kwargs["concat_latent_image"]  # like the pack's own, it fails without one
            conds = type(self).extra_conds(self, **{**kwargs, "concat_latent_image": None})
            return {**conds, "c_concat": CONDRegular(image)}

        model.add_object_patch("extra_conds", types.MethodType(extra_conds, model.model))
        entry = {"concat_latent_image": further}
        return (model, *([[text, {**options, **entry}] for text, options in cond] for cond in (positive, negative)))


class CountingModule(nn.Module):
    """A motion module: it treats the rows as frames, and lets them attend to each other."""

    def __init__(self, frames):
        super().__init__()
        self.frames = frames
        self.rows = []

    def forward(self, x, *args):
        self.rows.append(len(x))
        frames = x.unflatten(0, (-1, self.frames))  # fails if the rows are not a whole number of videos
        return (0.9 * frames + 0.1 * frames.mean(1, keepdim=True)).flatten(0, 1)


@node(frames=("INT", {"default": 4}))
class ProbeMotionModules:
    """AnimateDiff: modules in every block during a run. They count the rows and read the run's options."""

    def patch(self, model, frames):
        module = CountingModule(frames)

        def run(layer, x, emb, context, options, *args):
            assert len(x) % options["ad_params"]["full_length"] == 0, "not as many rows as frames"
            return layer(x)

        def inject(patcher):
            patcher.model.diffusion_model.input_blocks[1].append(module)
            patcher.model.diffusion_model.middle_block.append(module)

        def eject(patcher):
            for block in (
                patcher.model.diffusion_model.input_blocks[1],
                patcher.model.diffusion_model.middle_block,
            ):
                for place in [i for i, layer in enumerate(block) if layer is module][::-1]:
                    block.pop(place)

        model = model.clone()
        model.set_injections("probe", [PatcherInjection(inject, eject)])
        model.set_model_forward_timestep_embed_patch((CountingModule, run))
        model.model_options["transformer_options"]["ad_params"] = {"full_length": frames}
        model.set_attachments("probe", module)
        return (model,)


@node()
class ProbeAddsToLayers:
    """BrushNet and PowerPaint: another `forward` for every layer, which adds stored features to the next call, once."""

    def patch(self, model):
        def adding(self, x, *args, **kwargs):
            out = type(self).forward(self, x, *args, **kwargs)
            kept, self.kept = self.kept, None
            return out if kept is None else out + kept.to(out)

        def outer_sample_wrapper(executor, *args, **kwargs):
            unet = executor.class_obj.model_patcher.model.diffusion_model
            layers = [layer for block in unet.input_blocks for layer in block]
            for layer in layers:
                layer.kept, layer.forward = None, types.MethodType(adding, layer)
            try:
                return executor(*args, **kwargs)
            finally:
                for layer in layers:
                    del layer.kept, layer.forward

        def around_call(executor, x, *args, **kwargs):
            generator = torch.Generator().manual_seed(5)
            first = executor.class_obj.diffusion_model.input_blocks[0][0]
            first.kept = torch.randn(len(x), 320, *x.shape[2:], generator=generator)
            out = executor(x, *args, **kwargs)
            assert first.kept is None
            return out

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "probe", outer_sample_wrapper)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "probe", around_call)
        return (model,)


class SharedAttention(nn.Module):
    """Attention of another pack that replaces the host's, without the host's projections."""

    def __init__(self, original):
        super().__init__()
        self.original = [original]

    def forward(self, x, context=None, value=None, **kwargs):
        return 0.5 * self.original[0](x, context=context, value=value)


@node(layers=("INT", {"default": 99}))
class ProbeSharedAttention:
    """LayerDiffuse (joint) and similar: other modules in place of the self-attentions."""

    def patch(self, model, layers):
        model = model.clone()
        paths = [name for name, _ in model.model.diffusion_model.named_modules() if name.endswith(".attn1")]
        for path in paths[:layers]:
            original = model.get_model_object(f"diffusion_model.{path}")
            model.add_object_patch(f"diffusion_model.{path}", SharedAttention(original))
        return (model,)


@node()
class ProbeInputBlock:
    """Fooocus inpaint and control by the first block: features of the drawn size are added there."""

    def patch(self, model):
        feature = torch.randn(1, 320, 8, 8, generator=torch.Generator().manual_seed(7))

        def added(h, options):
            return h + feature.to(h).repeat(len(h), 1, 1, 1) if options["block"][1] == 0 else h

        model = model.clone()
        model.set_model_input_block_patch(added)
        return (model,)


class ProbeOtherNetwork:
    """A refiner node: some calls go to another model, with the options of the first."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "other": ("MODEL",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "patch", "probe"

    def patch(self, model, other, context=None):
        def wrapper(apply_model, call):
            c = (
                {**call["c"], "c_crossattn": context.expand(len(call["input"]), -1, -1)}
                if context is not None
                else call["c"]
            )
            return other.model.apply_model(call["input"], call["timestep"], **c)

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


MECHANISMS = (
    ProbeTiles,
    ProbeWiderInput,
    ProbeMotionModules,
    ProbeAddsToLayers,
    ProbeSharedAttention,
    ProbeInputBlock,
    ProbeOtherNetwork,
)
