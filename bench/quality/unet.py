"""The demo's base model, a UNet, as the quality bench uses it."""

from __future__ import annotations

from typing import Any

import torch

from ..host import demo_checkpoint


def unet_models() -> tuple[Any, Any, Any, str]:
    """MODEL, CLIP and VAE of the demo's checkpoint, and the first digits of its checksum."""
    import comfy.sd
    import folder_paths

    from demo.base.weights import WEIGHTS, sha256

    checkpoint = demo_checkpoint()
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint),
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            # On CUDA the host would choose float16, in which a full fine-tune cannot be trained.
            model_options={"dtype": torch.float32},
            te_model_options={"dtype": torch.float32},
        )
    # Without the text encoder, which is created on each machine and may differ in a bit.
    return model, clip, vae, sha256(WEIGHTS if WEIGHTS.exists() else checkpoint)[:16]
