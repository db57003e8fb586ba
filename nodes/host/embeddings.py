"""Save the token embedding as an embedding file, for `embedding:name` in any prompt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.adapter import Adapter
from ...core.adapter_file import header_metadata
from ...core.atomic_write import atomic_write
from .text import encoder_tokenizers

if TYPE_CHECKING:
    from comfy.sd import CLIP

FORMAT = "sa_inject_embedding"
EXTENSION = ".safetensors"
CLASS_WORD = "class word"  # an option in the list of file names
MOST_VECTORS = 16  # of a token embedding
HOST_LOOKS_FOR = ("", ".safetensors", ".pt", ".bin")

_written: set[Path] = set()  # by this process
_deletions: dict[Path, int] = {}


def save_embedding(adapter: Adapter, name: str) -> Path:
    """Write the token embedding to ComfyUI's embeddings folder as `name`, which may contain a sub-folder.

    Raises ValueError if `embedding:name` is a file that SA-Inject did not write.
    """
    path = embedding_path(name)
    tensors = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in adapter.token_embedding.items()}
    for other in _files_under(name):
        if other != path or not (_has_our_format(other) or _holds(other, tensors)):
            raise ValueError(
                f"The embedding was not written: {other} is there already, and SA-Inject did not write it. Move that "
                "file, rename the adapter, or switch write_embedding off."
            )
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT})
    _written.add(path)
    return path


def embedding_files() -> list[str]:
    """The names of all files in the host's embeddings folders."""
    return folder_paths.get_filename_list("embeddings")


def check_embedding_file(name: str) -> None:
    """Raise ValueError, with advice, if there is no such file."""
    if folder_paths.get_full_path("embeddings", name) is None:
        raise ValueError(
            f"There is no embedding '{name}' in ComfyUI/models/embeddings. Choose another initial_embedding, or "
            f"'{CLASS_WORD}'."
        )


def embedding_from_file(clip: CLIP, name: str) -> dict[str, Tensor]:
    """The vectors of an embedding file for each text encoder: {encoder: (n, width)}, float32.

    The host reads the file. Raises ValueError if it does not exist or does not fit the text encoders.
    """
    check_embedding_file(name)
    found = {}
    for encoder, tokenizer in encoder_tokenizers(clip).items():
        vectors, *_ = tokenizer._try_get_embedding(name)
        if vectors is None or vectors.shape[-1] != tokenizer.embedding_size:
            raise ValueError(
                f"The embedding '{name}' holds nothing for the text encoder {encoder} of this model. Choose one that "
                f"was made for the same kind of model as initial_embedding, or '{CLASS_WORD}'."
            )
        found[encoder] = vectors.reshape(-1, vectors.shape[-1]).float()
    lengths = {len(vectors) for vectors in found.values()}
    if len(lengths) != 1 or not 1 <= max(lengths) <= MOST_VECTORS:
        raise ValueError(
            f"The embedding '{name}' has {' and '.join(map(str, sorted(lengths)))} vectors. A word has 1 to "
            f"{MOST_VECTORS}, the same number for every text encoder. Choose another initial_embedding."
        )
    return found


def embedding_path(name: str) -> Path:
    """The path of an adapter's embedding file: the adapter's name with its sub-folder."""
    return Path(folder_paths.get_folder_paths("embeddings")[0]) / f"{_inside(name)}{EXTENSION}"


def times_deleted(name: str) -> int:
    """How often files that this process wrote were found deleted. They are then written again."""
    path = embedding_path(name)
    if path in _written and not path.exists():
        _written.remove(path)
        _deletions[path] = _deletions.get(path, 0) + 1
    return _deletions.get(path, 0)


def _inside(name: str) -> str:
    """`toys/robot.safetensors` -> `toys/robot`, never outside of the folder, as the host resolves names."""
    relative = os.path.relpath(os.path.join("/", name.replace("\\", "/").lstrip("/")), "/")
    return relative.removesuffix(EXTENSION)


def _files_under(name: str) -> Iterator[Path]:
    """Every file that the host could find for `embedding:name`."""
    for folder in folder_paths.get_folder_paths("embeddings"):
        for extension in HOST_LOOKS_FOR:
            path = Path(folder) / f"{_inside(name)}{extension}"
            if path.is_file():
                yield path


def _has_our_format(path: Path) -> bool:
    return header_metadata(path).get("format") == FORMAT


def _holds(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether the file holds this embedding, as written by versions without a format entry."""
    if path.suffix != EXTENSION or path.stat().st_size > 2**24:
        return False
    try:
        found = load_file(path)
    except SafetensorError:
        return False
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
