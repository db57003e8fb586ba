"""The sampler's UNet call, and a reference pass with the same arguments as far as other packs depend on them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from comfy.model_management import OOM_EXCEPTION, InterruptProcessingException
from torch import Tensor, nn

from ....core.kv import BlockKey
from ....core.reference import ReferencePassComplete
from ....core.site import AtSite
from ..networks.unet import NetworkInputs
from ..networks.unet_sites import attending
from .foreign import ForeignCode
from .row_texts import COND
from .sampling_run import RUN_KEY

if TYPE_CHECKING:
    from ..host_types import Arguments, TransformerOptions

# Options that the reference pass does not get: they are made for the rows and the size of the sampler's call.
PRIVATE = {"patches", "patches_replace", "wrappers", "callbacks", RUN_KEY}
LAYER_PATCHES = "forward_timestep_embed_patch"  # ComfyUI's patches for layers that other packs add to a block


class ReferencePassError(RuntimeError):
    """The reference pass failed in a model that other nodes have changed."""


@dataclass(frozen=True, eq=False)
class DrawingCall:
    """One UNet call of the sampler."""

    network: nn.Module
    unet: Callable[..., Tensor]  # called with (x, timestep, context, y, control, transformer_options)
    x: Tensor
    y: Tensor | None
    rest: Arguments  # further arguments
    options: TransformerOptions
    foreign: ForeignCode

    @property
    def rows(self) -> int | None:
        """The number of rows that the reference pass must have. None: any number."""
        return len(self.x) if self.foreign.modules else None

    def read(self, inputs: NetworkInputs, at: AtSite, blocks: Collection[BlockKey]) -> None:
        """Call the UNet for a reference pass, in which `at` computes the self-attention of these blocks."""
        inputs = self._with_rows(self._with_labels(inputs))
        rows = len(inputs.x)
        with (
            explain_errors(self.foreign),
            self.foreign.without_foreign_forwards(),
            attending(self.network, self._options(rows), at, blocks, keeps_hidden=True) as options,
        ):
            self.unet(*inputs, None, options, **self._further_arguments(rows))

    def _with_labels(self, inputs: NetworkInputs) -> NetworkInputs:
        y = inputs.y
        if self.y is None:
            y = None
        elif y is None or y.shape[1:] != self.y.shape[1:]:
            y = self.y[:1].expand(len(inputs.x), *self.y.shape[1:])
        return inputs._replace(y=y)

    def _with_rows(self, inputs: NetworkInputs) -> NetworkInputs:
        """Repeat the picture for each row of the sampler's call."""
        if self.rows is None:
            return inputs
        assert len(inputs.x) == 1, "with a fixed number of rows, pictures are encoded one by one"
        return NetworkInputs(*(None if t is None else t.repeat(self.rows, *[1] * (t.ndim - 1)) for t in inputs))

    def _options(self, rows: int) -> TransformerOptions:
        """The options of the sampler's call, which foreign modules may read, without the private ones."""
        options = {name: value for name, value in self.options.items() if name not in PRIVATE}
        if self.rows is None:
            options["cond_or_uncond"] = [COND]
            options.pop("uuids", None)
            if isinstance(options.get("sigmas"), Tensor):
                options["sigmas"] = options["sigmas"].flatten()[:1].expand(rows)
        layers = self.options.get("patches", {}).get(LAYER_PATCHES)
        return {**options, "patches": {LAYER_PATCHES: layers} if layers else {}}

    def _further_arguments(self, rows: int) -> Arguments:
        """Further arguments. Tensors with one row for each row of x are expanded to `rows`."""
        return {
            name: value[:1].expand(rows, *value.shape[1:])
            if isinstance(value, Tensor) and value.ndim and len(value) == len(self.x)
            else value
            for name, value in self.rest.items()
        }


def with_channels(x: Tensor, channels: int) -> Tensor:
    """Pad with zero channels: the input of such models for "no picture". x (b, c, h, w) -> (b, channels, h, w)

    Raises ReferencePassError if x has more channels.
    """
    missing = channels - x.shape[1]
    if missing < 0:
        raise ReferencePassError(
            f"SA-Inject cannot read the image prompt: this model wants {x.shape[1]} input channels, but another node "
            f"calls it with {channels}. Take that node off this model, or the Apply node."
        )
    return x if not missing else torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1)


@contextmanager
def explain_errors(foreign: ForeignCode) -> Iterator[None]:
    """Turn exceptions inside a changed network into a ReferencePassError that says what to do."""
    try:
        yield
    except (ReferencePassComplete, InterruptProcessingException, OOM_EXCEPTION):
        raise
    except Exception as error:
        names = ", ".join(sorted(foreign.modules))
        inside = f" It has modules of other nodes inside: {names}." if names else ""
        raise ReferencePassError(
            f"SA-Inject could not read the image prompt through this model: {error}.{inside} Take the node that "
            f"changes the model off it, or the Apply node."
        ) from error
