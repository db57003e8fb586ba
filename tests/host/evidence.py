"""Everything about a checkpoint that a training must not change."""

from typing import Any, NamedTuple

import torch

from tests.host.trainings import Checkpoint


class Evidence(NamedTuple):
    """Everything about a checkpoint that training must not change."""

    weights: dict[str, torch.Tensor]
    patches: dict[str, Any]
    picture: torch.Tensor


def draw(comfy_host, checkpoint: Checkpoint) -> torch.Tensor:
    model, clip, vae = checkpoint
    (positive,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="a toy on a table")
    (negative,) = comfy_host.execute("CLIPTextEncode", clip=clip, text="")
    (latent,) = comfy_host.execute("EmptyLatentImage", width=64, height=64)
    sampled = {"positive": positive, "negative": negative, "latent_image": latent, "seed": 1, "steps": 2, "cfg": 4.0}
    (samples,) = comfy_host.execute("KSampler", model=model, **sampled)
    return comfy_host.execute("VAEDecode", samples=samples, vae=vae)[0]


def modules_of(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    return {
        "unet": checkpoint.model.model,
        "clip": checkpoint.clip.cond_stage_model,
        "vae": checkpoint.vae.first_stage_model,
    }


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Copies of every parameter and buffer."""
    return {
        f"{part} {name}": tensor.detach().clone()
        for part, module in modules_of(checkpoint).items()
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }


def patches_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that a training run could leave behind, in a form that can be compared."""
    found: dict[str, Any] = {}
    for part, whole in modules_of(checkpoint).items():
        for name, module in whole.named_modules():
            functions = [len(getattr(module, kind, ())) for kind in ("weight_function", "bias_function")]
            found[f"{part} {name}"] = (
                type(module).__name__,
                "forward" in vars(module),
                len(module._forward_hooks) + len(module._forward_pre_hooks),
                getattr(module, "comfy_cast_weights", None),
                "prev_comfy_cast_weights" in vars(module),
                functions,
            )
        found[f"{part} with gradients"] = [name for name, p in whole.named_parameters() if p.grad is not None]
    for part, patcher in (("unet", checkpoint.model), ("clip", checkpoint.clip.patcher)):
        for attribute in ("model_options", "wrappers", "callbacks", "attachments", "force_cast_weights"):
            found[f"{part} patcher {attribute}"] = repr(getattr(patcher, attribute))
        for attribute in ("patches", "object_patches", "weight_wrapper_patches"):
            found[f"{part} patcher {attribute}"] = sorted(getattr(patcher, attribute))
        # Object patches of the patcher itself are there while it is loaded. Hosts newer than 0.3.75 have such patches.
        replaced = patcher.object_patches_backup.keys() - patcher.object_patches.keys()
        found[f"{part} patcher object_patches_backup"] = sorted(replaced)
        found[f"{part} patcher patches_uuid"] = patcher.patches_uuid
    found["compute precision"] = checkpoint.model.model.manual_cast_dtype
    found["tokenizer"] = checkpoint.clip.tokenizer
    return found


def assert_same_weights(now: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    assert now.keys() == then.keys()
    assert [name for name in then if not same_bytes(now[name], then[name])] == []


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def assert_unchanged(now: Evidence, then: Evidence) -> None:
    assert now.patches == then.patches
    assert_same_weights(now.weights, then.weights)
    assert torch.equal(now.picture, then.picture)
