"""The precision of the demo's base model: bfloat16 if the processor multiplies in it, else float32.

A processor without such instructions emulates bfloat16 and is up to a hundred times slower with it.
"""

from functools import cache
from pathlib import Path

import torch

CPU_INFO: Path = Path("/proc/cpuinfo")
INSTRUCTIONS: tuple[str, ...] = ("avx512_bf16", "amx_bf16")


@cache
def fast_type(device: str) -> torch.dtype:
    """The fastest type that is good enough for training and sampling."""
    if device != "cpu":
        return torch.bfloat16
    flags = CPU_INFO.read_text().split() if CPU_INFO.exists() else []
    return torch.bfloat16 if any(name in flags for name in INSTRUCTIONS) else torch.float32


def fast(device: str) -> torch.autocast:
    """A context in which layers compute in `fast_type`."""
    dtype = fast_type(device)
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
