"""Load checkpoints by name, as ComfyUI's own loader does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.sd
import folder_paths

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE


def checkpoint_path(name: str) -> str:
    """The path of a checkpoint. Raises ValueError with all names if it does not exist."""
    path = folder_paths.get_full_path("checkpoints", name)
    if path is None:
        known = folder_paths.get_filename_list("checkpoints")
        raise ValueError(
            f"there is no checkpoint '{name}' in models/checkpoints. There is: {', '.join(known) or 'none at all'}."
        )
    return path


def load_checkpoint(name: str) -> tuple[ModelPatcher, CLIP | None, VAE | None]:
    """-> model, clip, vae"""
    return comfy.sd.load_checkpoint_guess_config(
        checkpoint_path(name),
        output_vae=True,
        output_clip=True,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
    )[:3]
