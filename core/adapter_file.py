"""One adapter, one `.safetensors`: what is written, what is checked on reading, and what is said when it is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter import REFERENCE_MODES, Adapter, AdapterInfo
from .image_prompt import ReferenceText
from .kv import BlockKey
from .layers import SelfAttentionLayer
from .lora import SelfAttentionLoRA
from .whole_file import whole_file

FORMAT = "sa_inject"
FORMAT_VERSION = "1"
TOKEN_PREFIX = "token_embedding."
TEXT_KEY = "reference_text.cross_attn"
POOLED_KEY = "reference_text.pooled"
MAX_RANK = 1024  # far above anything useful; a damaged number must not ask for all the memory there is
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class AdapterFileError(ValueError):
    """A file that is not a usable adapter; the message says what is wrong with it and what to do."""


def save_adapter(
    adapter: Adapter, path: Path, extra_metadata: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float16
) -> None:
    """Write an adapter; a file under `path` is always whole.

    Raises OSError when the folder cannot be written or the disk is full; nothing is left behind then.
    """
    tensors = {
        **adapter.lora.state_dict(),
        **{f"{TOKEN_PREFIX}{encoder}": tensor for encoder, tensor in adapter.tokens.items()},
        TEXT_KEY: adapter.text.cross_attn,
        **({} if adapter.text.pooled is None else {POOLED_KEY: adapter.text.pooled}),
    }
    tensors = {key: tensor.detach().to("cpu", dtype, copy=True).contiguous() for key, tensor in tensors.items()}
    metadata = {**(extra_metadata or {}), **_metadata(adapter.info)}
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # its own name for a full disk
            raise OSError(str(error)) from error


def load_adapter(path: Path) -> Adapter:
    """Read and check an adapter. Trainables come back as float32 on the CPU.

    Raises AdapterFileError for a file that is empty, truncated, pickled, of another format or version, or whose
    tensors are missing, surplus, misshapen or not finite.
    """
    name = path.name
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise AdapterFileError(
            f"'{name}' is a safetensors file but not an SA-Inject adapter (its metadata names no '{FORMAT}' format). "
            "LoRA files and embeddings belong in the host's own loaders."
        )
    version = metadata.get("format_version", "none")
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"'{name}' has adapter format version {version}; this pack reads version {FORMAT_VERSION}. "
            "Update SA-Inject, or train the adapter again."
        )
    info = _info(name, metadata)
    lora = SelfAttentionLoRA(info.layers, info.rank, info.alpha, torch.Generator())
    _check_tensors(name, tensors, lora)
    lora.load_state_dict(tensors)
    return Adapter(
        name=path.stem,
        info=info,
        lora=lora,
        tokens={k.removeprefix(TOKEN_PREFIX): v for k, v in tensors.items() if k.startswith(TOKEN_PREFIX)},
        text=ReferenceText(tensors[TEXT_KEY], tensors.get(POOLED_KEY)),
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    name = path.name
    if path.stat().st_size == 0:
        raise AdapterFileError(f"'{name}' is empty. Copy or train it again.")
    with path.open("rb") as file:
        start = file.read(9)
    # Eight bytes of safetensors are a length, which may happen to look like a pickle; then its header opens.
    if start.startswith(PICKLE_STARTS) and not start.endswith(b"{"):
        raise AdapterFileError(
            f"'{name}' is a pickled file, which could run code when opened; it was not opened. "
            "SA-Inject adapters are safetensors files."
        )
    try:
        with safe_open(path, framework="pt") as file:
            # float() copies half precision, clone() the rest: nothing keeps the file mapped.
            return {key: file.get_tensor(key).float().clone() for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise AdapterFileError(
            f"'{name}' is truncated or damaged ({error}). Copy it again, or train it again."
        ) from error


def _info(name: str, metadata: Mapping[str, str]) -> AdapterInfo:
    try:
        mode = metadata["reference_mode"]
        if mode not in REFERENCE_MODES:
            raise ValueError(f"reference_mode is '{mode}'")
        layers = tuple(_layer(entry) for entry in json.loads(metadata["blocks"]))
        rank, alpha = int(metadata["rank"]), float(metadata["alpha"])
        if not layers or not 1 <= rank <= MAX_RANK or not 0 < alpha < math.inf:
            raise ValueError(f"{len(layers)} blocks, rank {rank}, alpha {alpha}")
        return AdapterInfo(
            architecture=metadata["architecture"],
            layers=layers,
            rank=rank,
            alpha=alpha,
            reference_mode=mode,
            placeholder=metadata["placeholder"],
            class_word=metadata["class_word"],
            training=json.loads(metadata["training"]),
        )
    except KeyError as error:
        raise AdapterFileError(f"'{name}' lacks the metadata entry {error}. Train it again.") from error
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"'{name}' has unreadable metadata ({error}). Train it again.") from error


def _metadata(info: AdapterInfo) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": info.architecture,
        "blocks": json.dumps([[*layer.key, layer.path, layer.query_dim, layer.inner_dim] for layer in info.layers]),
        "rank": str(info.rank),
        "alpha": str(info.alpha),
        "reference_mode": info.reference_mode,
        "placeholder": info.placeholder,
        "class_word": info.class_word,
        "training": json.dumps(info.training, sort_keys=True),
    }


def _layer(entry: list[Any]) -> SelfAttentionLayer:
    stage, index, depth, path, query_dim, inner_dim = entry
    return SelfAttentionLayer(BlockKey(stage, index, depth), path, query_dim, inner_dim)


def _check_tensors(name: str, tensors: Mapping[str, Tensor], lora: SelfAttentionLoRA) -> None:
    expected = {key: parameter.shape for key, parameter in lora.named_parameters()}
    tokens = [key for key in tensors if key.startswith(TOKEN_PREFIX)]
    missing = [key for key in (*expected, TEXT_KEY) if key not in tensors]
    if not tokens:
        missing.append(f"{TOKEN_PREFIX}<encoder>")
    if missing:
        raise AdapterFileError(f"'{name}' lacks {_some(missing)}. The file is incomplete: train it again.")
    surplus = [key for key in tensors if key not in {*expected, *tokens, TEXT_KEY, POOLED_KEY}]
    if surplus:
        raise AdapterFileError(
            f"'{name}' holds {_some(surplus)}, which an adapter of format {FORMAT_VERSION} does not have. "
            "It was changed by another program: use the original file."
        )
    misshapen = [key for key, shape in expected.items() if tensors[key].shape != shape]
    if misshapen:
        key = misshapen[0]
        raise AdapterFileError(
            f"'{name}': {key} has shape {tuple(tensors[key].shape)}, expected {tuple(expected[key])}. Train it again."
        )
    dimensions = {**dict.fromkeys(tokens, 2), TEXT_KEY: 3, POOLED_KEY: 2}
    for key, wanted in dimensions.items():
        if key in tensors and tensors[key].ndim != wanted:
            raise AdapterFileError(
                f"'{name}': {key} has {tensors[key].ndim} dimensions, expected {wanted}. Train it again."
            )
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterFileError(
            f"'{name}' holds NaN or infinite values in {_some(broken)}. The training diverged: "
            "train again with a lower learning rate."
        )


def _some(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
