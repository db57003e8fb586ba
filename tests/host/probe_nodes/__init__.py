"""Nodes of a second pack for tests: nodes that interfere with ours, and a fast loader."""

import comfy.sd
import comfy.utils
import folder_paths
from comfy.ldm.modules.attention import optimized_attention

from .mechanisms import MECHANISMS


class ProbeLoadCheckpoint:
    """The stock loader, but with text encoders of few layers: SDXL's full ones take ten seconds on a CPU."""

    @classmethod
    def INPUT_TYPES(cls):
        names = folder_paths.get_filename_list("checkpoints")
        return {"required": {"ckpt_name": (names,), "text_layers": ("INT", {"default": 3, "min": 3, "max": 32})}}

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "probe"

    def load(self, ckpt_name, text_layers):
        few_layers = {f"clip_{name}_model_config": {"num_hidden_layers": text_layers} for name in "lgh"}
        state_dict = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("checkpoints", ckpt_name))
        embeddings = folder_paths.get_folder_paths("embeddings")
        return comfy.sd.load_state_dict_guess_config(
            state_dict, embedding_directory=embeddings, te_model_options=few_layers
        )[:3]


class ProbeReplaceAttn1:
    """An attn1 replacement of another pack: the host's attention with a scaled output, which is visible."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "stage": (["input", "middle", "output"],),
                "index": ("INT", {"default": 1, "min": 0, "max": 12}),
                "depth": ("INT", {"default": -1, "min": -1, "max": 10, "tooltip": "-1: the key without a depth"}),
                "scale": ("FLOAT", {"default": 0.0, "min": -10.0, "max": 10.0}),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "probe"

    def patch(self, model, stage, index, depth, scale):
        def replacement(q, k, v, extra_options):
            out = optimized_attention(q, k, v, extra_options["n_heads"], transformer_options=extra_options)
            return out * scale

        model = model.clone()
        model.set_model_attn1_replace(replacement, stage, index, None if depth < 0 else depth)
        return (model,)


class ProbeFail:
    """A node that raises."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "message": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "fail"
    CATEGORY = "probe"

    def fail(self, images, message):
        raise ValueError(message)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (ProbeLoadCheckpoint, ProbeReplaceAttn1, ProbeFail, *MECHANISMS)}
