"""Adapter files: one `.safetensors` per adapter, written atomically and checked when it is read.

The header is read and checked first. The tensors are read only if the header is that of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  # of a bare PathLike
from torch import Tensor

from .adapter import Adapter, AdapterInfo
from .adapter_metadata import (
    FORMAT,
    FORMAT_VERSION,
    MAX_WIDTH,
    UnusableMetadataError,
    from_metadata,
    shortened,
    to_metadata,
)
from .atomic_write import atomic_write
from .image_prompt import TextConditioning
from .layers import SelfAttentionLayer
from .lora import SelfAttentionLoRA, parameter_shapes

TOKEN_PREFIX = "token_embedding."
TEXT_KEY = "reference_text.cross_attn"
POOLED_KEY = "reference_text.pooled"
FILE_DTYPE = torch.float16
TEXT_BYTES = 2**19  # reserved for class conditioning and token embedding; SDXL has the largest
MAX_NUMBERS = 2**29  # in one file, 2 GB as float32; rank 128 on SDXL has 46 million
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class AdapterFileError(ValueError):
    """A file that is not a usable adapter. The message says what is wrong and what to do."""


def save_adapter(
    adapter: Adapter,
    path: Path,
    extra_metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = FILE_DTYPE,
    replace: bool = True,
) -> None:
    """Write an adapter. The file at `path` is complete, or it is not there.

    Raises OSError if the folder cannot be written or the disk is full; nothing is left behind. Without `replace`, an
    existing file is kept and NameTakenError is raised.
    """
    tensors = _tensors(adapter, dtype)
    metadata = {**(extra_metadata or {}), **to_metadata(adapter.info)}
    with atomic_write(path, replace) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # safetensors raises it for a full disk
            raise OSError(str(error)) from error


def holds_adapter(path: Path, adapter: Adapter) -> bool:
    """Whether a file holds this adapter, as `save_adapter` writes it. Its name, date and workflow do not matter."""
    wanted = _tensors(adapter, FILE_DTYPE)
    try:
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            metadata: dict[str, str] = file.metadata() or {}
            if any(metadata.get(key) != value for key, value in to_metadata(adapter.info).items()):
                return False
            if set(file.keys()) != wanted.keys():
                return False
            return all(_same(key, file.get_tensor(key), tensor) for key, tensor in wanted.items())
    except (SafetensorError, OSError):
        return False


def _same(key: str, stored: Tensor, wanted: Tensor) -> bool:
    if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
        return False
    if key in (TEXT_KEY, POOLED_KEY):  # not trained; another device rounds the encoding differently
        return torch.allclose(stored.float(), wanted.float(), rtol=1e-2, atol=1e-2)
    return torch.equal(stored, wanted)


def adapter_bytes(layers: Sequence[SelfAttentionLayer], rank: int) -> int:
    """Approximate size of an adapter file, without its metadata."""
    parameters = sum(2 * rank * (layer.query_dim + layer.inner_dim) for layer in layers)  # of keys and values
    return parameters * FILE_DTYPE.itemsize + TEXT_BYTES


def load_adapter(path: Path) -> Adapter:
    """Read and check an adapter. Trainables come back as float32 on the CPU.

    Raises AdapterFileError for a file that is empty, truncated, pickled, or of another format or version. Also for
    unusable metadata, and for tensors that are missing, surplus, of the wrong shape, or not finite.
    """
    name = path.name
    _refuse_other_kinds(path)
    try:
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            info = _info(name, file.metadata() or {})
            _check_header(name, file, info)
            # float() copies half precision, clone() the rest, so that the file is not kept mapped.
            tensors: dict[str, Tensor] = {key: file.get_tensor(key).float().clone() for key in file.keys()}
    except SafetensorError as error:
        raise AdapterFileError(
            f"'{name}' is truncated or damaged ({shortened(error)}). Copy it again, or train it again."
        ) from error
    _check_values(name, tensors)
    lora = SelfAttentionLoRA(info.layers, info.rank, info.alpha, torch.Generator())
    lora.load_state_dict(tensors)
    return Adapter(
        name=path.stem,
        info=info,
        lora=lora,
        token_embedding={k.removeprefix(TOKEN_PREFIX): v for k, v in tensors.items() if k.startswith(TOKEN_PREFIX)},
        class_conditioning=TextConditioning(tensors[TEXT_KEY], tensors.get(POOLED_KEY)),
    )


def adapter_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of an adapter file, unchecked, from its header alone. None for any other file.

    Raises OSError when the file cannot be read.
    """
    metadata = header_metadata(path)
    return metadata if metadata.get("format") == FORMAT else None


def header_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone. Empty for any other file.

    Raises OSError when the file cannot be read.
    """
    try:
        opened: Any = safe_open(path, framework="np")
        with opened as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _tensors(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        **adapter.lora.state_dict(),
        **{f"{TOKEN_PREFIX}{encoder}": tensor for encoder, tensor in adapter.token_embedding.items()},
        TEXT_KEY: adapter.class_conditioning.cross_attn,
        **({} if adapter.class_conditioning.pooled is None else {POOLED_KEY: adapter.class_conditioning.pooled}),
    }
    return {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}


def _refuse_other_kinds(path: Path) -> None:
    name = path.name
    if path.stat().st_size == 0:
        raise AdapterFileError(f"'{name}' is empty. Copy or train it again.")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with eight bytes of length, which may look like a pickle, and then a brace.
    if start.startswith(PICKLE_MAGIC) and not start.endswith(b"{"):
        raise AdapterFileError(
            f"'{name}' is a pickled file, which could run code when opened; it was not opened. "
            "SA-Inject adapters are safetensors files."
        )


def _info(name: str, metadata: Mapping[str, str]) -> AdapterInfo:
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"'{name}' is a safetensors file but not an SA-Inject adapter (its metadata names no '{FORMAT}' format). "
            "LoRA files and embeddings belong in the host's own loaders."
        )
    version = metadata.get("format_version", "none")
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"'{name}' has adapter format version {version[:20]}; this pack reads version {FORMAT_VERSION}. "
            "Update SA-Inject, or train the adapter again."
        )
    try:
        return from_metadata(metadata)
    except KeyError as error:
        raise AdapterFileError(f"'{name}' lacks the metadata entry {error}. Train it again.") from error
    except UnusableMetadataError as error:
        raise AdapterFileError(f"'{name}' has unreadable metadata ({error}). Train it again.") from error


def _check_header(name: str, file: Any, info: AdapterInfo) -> None:
    """Check names, shapes and types of the tensors before any is read or allocated."""
    found = {key: file.get_slice(key) for key in file.keys()}
    shapes = {key: tuple(tensor.get_shape()) for key, tensor in found.items()}
    expected = parameter_shapes(info.layers, info.rank)
    tokens = [key for key in found if key.startswith(TOKEN_PREFIX)]
    missing = [key for key in (*expected, TEXT_KEY) if key not in found]
    if not tokens:
        missing.append(f"{TOKEN_PREFIX}<encoder>")
    if missing:
        raise AdapterFileError(f"'{name}' lacks {_first_and_count(missing)}. The file is incomplete: train it again.")
    surplus = [key for key in found if key not in {*expected, *tokens, TEXT_KEY, POOLED_KEY}]
    if surplus:
        raise AdapterFileError(
            f"'{name}' holds {_first_and_count(surplus)}, which an adapter of format {FORMAT_VERSION} does not have. "
            "It was changed by another program: use the original file."
        )
    for key, shape in expected.items():
        if shapes[key] != shape:
            raise AdapterFileError(f"'{name}': {key} has shape {shapes[key]}, expected {shape}. Train it again.")
    dimensions = {**dict.fromkeys(tokens, 2), TEXT_KEY: 3, POOLED_KEY: 2}
    for key, wanted in dimensions.items():
        shape = shapes.get(key)
        if shape is not None and len(shape) != wanted:
            raise AdapterFileError(
                f"'{name}': {shortened(key)} has {len(shape)} dimensions, expected {wanted}. Train it again."
            )
        if shape is not None and (0 in shape or shape[-1] > MAX_WIDTH or (key not in tokens and shape[0] != 1)):
            raise AdapterFileError(
                f"'{name}': {shortened(key)} has shape {shape}, which no training gives. Train it again."
            )
    numbers = sum(torch.Size(shape).numel() for shape in shapes.values())
    if numbers > MAX_NUMBERS:
        raise AdapterFileError(f"'{name}' holds {numbers} numbers, more than any adapter has. Train it again.")
    others = [key for key, tensor in found.items() if tensor.get_dtype() not in FLOATS]
    if others:
        raise AdapterFileError(
            f"'{name}': {_first_and_count(others)} holds numbers of the type {found[others[0]].get_dtype()}. "
            "It was changed by another program: use the original file."
        )


def _check_values(name: str, tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterFileError(
            f"'{name}' holds NaN or infinite values in {_first_and_count(broken)}. The training diverged: "
            "train again with a lower learning rate."
        )


def _first_and_count(keys: list[str]) -> str:
    first = shortened(keys[0])
    return first if len(keys) == 1 else f"{first} and {len(keys) - 1} more"
