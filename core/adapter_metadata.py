"""Adapter metadata as text entries of the file's header. Every value is checked when it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from .adapter import REFERENCE_MODES, AdapterInfo, ReferenceMode
from .kv import BlockKey
from .layers import SelfAttentionLayer
from .positions import POSITION_RULES, PositionRule

FORMAT = "sa_inject"
FORMAT_VERSION = "1"

# Limits far above useful values, so that a damaged number cannot use up memory or time.
MAX_RANK = 1024
MAX_ALPHA = 2.0**20
MAX_LAYERS = 1000
MAX_WIDTH = 2**16
MAX_INDEX = 1000  # of a block in its stage, and of a layer in its block
MAX_WORD = 200  # letters
STAGES = ("input", "middle", "output", "noise_refiner", "layers", "double_blocks", "single_blocks")
PATH = re.compile(r"\w{1,64}(\.\w{1,64}){0,15}", re.ASCII)
EMPTY_MODULE = nn.Module()


class UnusableMetadataError(ValueError):
    """A metadata value that is not valid. The message names it."""


def to_metadata(info: AdapterInfo) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": info.architecture,
        "blocks": json.dumps([[*layer.key, layer.path, layer.query_dim, layer.inner_dim] for layer in info.layers]),
        "rank": str(info.rank),
        "alpha": str(info.alpha),
        "reference_mode": info.reference_mode,
        "placeholder": info.placeholder_token,
        "class_word": info.class_word,
        "training": json.dumps(info.training, sort_keys=True),
        **({} if info.positions == "none" else {"positions": info.positions}),
    }


def from_metadata(metadata: Mapping[str, str]) -> AdapterInfo:
    """Read and check the entries that `to_metadata` writes.

    Raises KeyError for a missing entry, and UnusableMetadataError for an invalid one.
    """
    mode = metadata["reference_mode"]
    if mode not in REFERENCE_MODES:
        raise UnusableMetadataError(f"reference_mode is '{shortened(mode)}'")
    positions = metadata.get("positions", "none")
    if positions not in POSITION_RULES:
        raise UnusableMetadataError(f"positions is '{shortened(positions)}'")
    rank = _number(metadata["rank"], int, "rank")
    alpha = _number(metadata["alpha"], float, "alpha")
    if not 1 <= rank <= MAX_RANK:
        raise UnusableMetadataError(f"rank is {shortened(rank)}")
    if not (math.isfinite(alpha) and 0 < alpha <= MAX_ALPHA):
        raise UnusableMetadataError(f"alpha is {alpha}")
    placeholder_token = metadata["placeholder"]
    if not 0 < len(placeholder_token) <= MAX_WORD or re.search(r"\s", placeholder_token):
        raise UnusableMetadataError(f"placeholder is '{shortened(placeholder_token)}'")
    training = _json(metadata["training"], "training")
    if not isinstance(training, dict):
        raise UnusableMetadataError("training is no list of settings")
    return AdapterInfo(
        architecture=metadata["architecture"],
        layers=_layers(_json(metadata["blocks"], "blocks")),
        rank=rank,
        alpha=alpha,
        reference_mode=cast(ReferenceMode, mode),
        placeholder_token=placeholder_token,
        class_word=metadata["class_word"],
        training=cast("dict[str, Any]", training),
        positions=cast(PositionRule, positions),
    )


def _layers(entries: Any) -> tuple[SelfAttentionLayer, ...]:
    if not isinstance(entries, list) or not 1 <= len(cast("list[Any]", entries)) <= MAX_LAYERS:
        raise UnusableMetadataError(f"blocks is no list of 1 to {MAX_LAYERS} layers")
    layers = tuple(_layer(entry) for entry in cast("list[Any]", entries))
    if len({layer.key for layer in layers}) < len(layers):
        raise UnusableMetadataError("blocks names a layer twice")
    # In sorted order, a path is followed directly by the paths inside it.
    paths = sorted(layer.path.split(".") for layer in layers)
    for outer, inner in zip(paths, paths[1:], strict=False):
        if inner[: len(outer)] == outer:
            raise UnusableMetadataError(f"blocks has a layer at {shortened('.'.join(outer))} and one inside it")
    return layers


def _layer(entry: Any) -> SelfAttentionLayer:
    if not isinstance(entry, list) or len(cast("list[Any]", entry)) != 6:
        raise UnusableMetadataError(f"blocks has the entry {shortened(entry)}")
    stage, index, depth, path, query_dim, inner_dim = cast("list[Any]", entry)
    indices = all(type(number) is int and 0 <= number < MAX_INDEX for number in (index, depth))
    widths = all(type(width) is int and 1 <= width <= MAX_WIDTH for width in (query_dim, inner_dim))
    named = isinstance(path, str) and PATH.fullmatch(path) is not None
    if stage not in STAGES or not indices or not widths or not named:
        raise UnusableMetadataError(f"blocks has the entry {shortened(entry)}")
    if any(hasattr(EMPTY_MODULE, name) for name in path.split(".")):  # names of module attributes cannot be submodules
        raise UnusableMetadataError(f"blocks has a layer at {shortened(path)}")
    return SelfAttentionLayer(BlockKey(stage, index, depth), path, query_dim, inner_dim)


def _number(text: str, kind: type, entry: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UnusableMetadataError(f"{entry} is '{shortened(text)}'") from error


def _json(text: str, entry: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableMetadataError(f"{entry} is no JSON: {shortened(error)}") from error


def shortened(value: Any) -> str:
    """The value as text of at most 100 characters, for messages. A file may hold a value of any length."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
