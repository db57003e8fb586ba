"""Replace the forward of the host's modules inside a context."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from ..host_types import Forward


@contextlib.contextmanager
def patched_forward(modules: Sequence[nn.Module], forward: Forward) -> Iterator[None]:
    """Let each module compute `forward(module, its original forward, *inputs)`. It is restored afterwards."""
    earlier = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.__dict__["forward"] = functools.partial(forward, module, module.forward)
    try:
        yield
    finally:
        for module, forward_before in zip(modules, earlier, strict=True):
            if forward_before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward_before
