"""Which rows of a UNet call belong to the positive prompt.

ComfyUI tells it for each chunk of rows, and all chunks are of one size. Tiling nodes change the rows. Then each row's
text is compared with the texts of the guider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.patcher_extension import WrapperExecutor
    from comfy.samplers import CFGGuider

    from ..host_types import Cond, TransformerOptions

COND = 0  # ComfyUI's mark of a chunk of conditional rows in `cond_or_uncond`
SURE = 4.0  # a row has a text if the texts of the other kind are at least this many times as distant
HARMLESS = {"torch.compile"}  # keys of wrappers around apply_model that leave the rows as they are


class RowText(NamedTuple):
    """One text of a guider, as it is in a row of the call."""

    is_positive: bool
    context: Tensor  # (tokens, width)
    y: Tensor | None


@dataclass(eq=False)
class GuiderTexts:
    """The texts of the run's guider, on the device of the rows and in their precision."""

    of: dict[str, list[Cond]] | None = None
    rows: dict[tuple, list[RowText]] = field(default_factory=dict)

    def on(self, guider: CFGGuider, like: Tensor) -> list[RowText]:
        conds = getattr(guider, "conds", None) or {}
        if self.of is not conds:
            self.of, self.rows = conds, {}
        key = (like.device, like.dtype)
        if key not in self.rows:
            self.rows[key] = list(_row_texts(conds, like))
        return self.rows[key]


def conditional_rows(
    guider: CFGGuider, texts: GuiderTexts, options: TransformerOptions, arguments: Sequence[Any], is_plain: bool
) -> list[bool] | None:
    """For each row of a UNet call (x, timestep, context, y, ...), whether it belongs to the positive prompt.

    None if nothing tells. In a call of unknown layout, a row without a known text does not belong to it.
    """
    x, _, context, y = arguments[:4]
    layout = _by_layout(conditional_chunks(guider, options), len(x), options.get("sigmas"), is_plain)
    if is_plain and layout is not None:
        return layout
    known = uncompiled_by_text(guider, texts, context, y) if isinstance(context, Tensor) else [None] * len(x)
    if None not in known and len(known) == len(x):
        return [bool(row) for row in known]
    if layout is not None and all(row in (None, by_chunk) for row, by_chunk in zip(known, layout, strict=False)):
        return layout
    return [row is True for row in known] if any(row is not None for row in known) else None


def conditional_chunks(guider: CFGGuider, options: TransformerOptions) -> list[bool]:
    """For each chunk of a UNet call, whether it has the positive text, by ComfyUI's options."""
    kinds = options.get("cond_or_uncond") or [COND]
    uuids = options.get("uuids", [])
    if len(uuids) != len(kinds):
        uuids = [None] * len(kinds)
    return [_is_conditional(guider, kind, uuid) for kind, uuid in zip(kinds, uuids, strict=True)]


def _is_conditional(guider: CFGGuider, kind: int, uuid: UUID | None) -> bool:
    """Whether a cond is positive: by its id, or by `kind`, its index in the guider's list, if the id is ambiguous.

    The positive is not the first one in every list: not in DualCFGGuider's, nor in the extra pass of a guidance node.
    With areas, ComfyUI copies ids from positive to negative. Then the index decides.
    """
    conds = getattr(guider, "conds", {})
    owners = [name for name, entries in conds.items() if any(c.get("uuid", guider) == uuid for c in entries)]
    is_positive = {name == "positive" for name in owners}
    if "positive" not in conds or len(is_positive) != 1:
        return kind == COND
    return is_positive == {True}


def is_plain_call(executor: WrapperExecutor, guider: CFGGuider, base: BaseModel, options: TransformerOptions) -> bool:
    """Whether no other pack could have changed the rows between ComfyUI and the UNet."""
    wrappers = options.get("wrappers", {})
    around = {key for key, found in wrappers.get(WrappersMP.APPLY_MODEL, {}).items() if found}
    batching = any(wrappers.get(WrappersMP.CALC_COND_BATCH, {}).values())
    is_wrapped = "model_function_wrapper" in (getattr(guider, "model_options", None) or {})
    return not (is_wrapped or batching or around - HARMLESS or executor.idx or "apply_model" in vars(base))


def _by_layout(chunks: Sequence[bool], rows: int, sigmas: Tensor | None, is_plain: bool) -> list[bool] | None:
    """For each row, by the order of the chunks. Nodes that add tiles repeat this order for each tile."""
    if len(set(chunks)) == 1:
        return [chunks[0]] * rows
    batch = rows // len(chunks) if is_plain or sigmas is None else sigmas.numel()
    one_tile = [kind for kind in chunks for _ in range(batch)]
    times, left = divmod(rows, max(1, len(one_tile)))
    return None if left or not times else one_tile * times


def _by_text(guider: CFGGuider, texts: GuiderTexts, context: Tensor, y: Tensor | None) -> list[bool | None]:
    known = texts.on(guider, context)
    if not any(text.is_positive for text in known):
        return [None] * len(context)
    far = torch.full((len(context),), torch.inf, device=context.device)
    nearest = {True: far, False: far}
    for text in known:
        nearest[text.is_positive] = torch.minimum(nearest[text.is_positive], _distances(text, context, y))
    pairs = torch.stack([nearest[True], nearest[False]]).cpu().T.tolist()
    return [_is_nearer(positive, other) for positive, other in pairs]


uncompiled_by_text: Any = torch.compiler.disable(_by_text)


def _is_nearer(positive: float, other: float) -> bool | None:
    if positive < other and SURE * positive <= other:
        return True
    if other < positive and SURE * other <= positive:
        return False
    return None


def _distances(text: RowText, context: Tensor, y: Tensor | None) -> Tensor:
    """Distance of each row's text from a text, relative to the text's size. context (b, n, width) -> (b,)"""
    times, left = divmod(context.shape[1], len(text.context))
    if left or context.shape[2] != text.context.shape[1]:
        return torch.full((len(context),), torch.inf, device=context.device)
    distance = _apart(context, text.context.repeat(times, 1))  # ComfyUI repeats a shorter text in the same way
    if y is not None and text.y is not None and y.shape[1:] == text.y.shape:
        distance = distance + _apart(y, text.y)
    return distance


def _apart(rows: Tensor, text: Tensor) -> Tensor:
    rows, text = rows.float(), text.float()
    return (rows - text).square().flatten(1).mean(1) / text.square().mean().clamp(min=1e-12)


def _row_texts(conds: dict[str, list[Cond]], like: Tensor):
    for name, entries in conds.items():
        for entry in entries:
            found = {key: getattr(value, "cond", None) for key, value in entry.get("model_conds", {}).items()}
            context, y = found.get("c_crossattn"), found.get("y")
            if not isinstance(context, Tensor) or context.ndim != 3:
                continue
            context = context.to(like)
            y = y.to(like) if isinstance(y, Tensor) and len(y) else None
            for row in range(len(context)):
                yield RowText(name == "positive", context[row], None if y is None else y[row % len(y)])
