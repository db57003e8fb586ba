"""A store for many tensors: in memory up to a size, and then on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

log = logging.getLogger(__name__)

TRIM_BYTES = 2**26  # written to disk between two calls of malloc_trim, each of which takes milliseconds


class TensorStore:
    """`keep` returns tensors with the same values. Tensors on disk are memory-mapped files.

    The operating system can free such memory at any time, and reads the file again when it is needed.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.on_disk = 0  # tensors
        self._left = memory_bytes
        self._freed = 0  # bytes written to disk since the last call of malloc_trim

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, on disk if `memory_bytes` are used up. If the disk is full, it stays in memory."""
        size = tensor.numel() * tensor.element_size()
        if size <= self._left or size == 0:
            self._left -= size
            return tensor
        try:
            mapped = _mapped(tensor)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            log.warning(
                "SA-Inject: a picture could not be written to the temporary folder and stays in memory: %s", error
            )
            return tensor
        self.on_disk += 1
        self._freed += size
        if self._freed >= TRIM_BYTES:
            self._freed = 0
            _malloc_trim()(0)
        return mapped


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    """glibc's function that gives freed memory back to the system; elsewhere one that does nothing.

    glibc keeps the memory of most pictures that were decoded and freed. So a set on disk would take memory after all.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim or (lambda _: None)


def _mapped(tensor: Tensor) -> Tensor:
    """The same values in a temporary file, which is deleted when the tensor is."""
    folder = Path(folder_paths.get_temp_directory())  # ComfyUI empties it when it starts and ends
    folder.mkdir(parents=True, exist_ok=True)
    plain = tensor.detach().cpu().contiguous()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="sa_inject-", suffix=".tensor", delete=False) as file:
        file.write(plain.flatten().view(torch.uint8).numpy().data)
    try:
        with torch.inference_mode(False):  # so that autograd accepts it
            storage = torch.UntypedStorage.from_file(file.name, False, plain.numel() * plain.element_size())
            return torch.empty(0, dtype=plain.dtype).set_(storage, 0, plain.shape, plain.stride())
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is in use
            Path(file.name).unlink()
