"""PEFT's LoRA layer, even if other installed packages are broken.

PEFT tries to import every quantization package that it supports, and an old or broken one raises an error. So the layer
is created directly, and a package that breaks the import of PEFT is hidden while PEFT is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

ADAPTER_NAME = "default"
REQUIREMENT = "peft>=0.18.1"  # the same as in requirements.txt; README says what it was tested with
NEEDED = {"peft", "transformers", "accelerate", "torch"}  # PEFT cannot do without these


def lora_linear(base: nn.Linear, rank: int, alpha: float) -> nn.Module:
    """PEFT's LoRA around a Linear on `meta`. Raises ImportError, with advice, if PEFT cannot be imported."""
    peft = import_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha)
    with torch.device("meta"):
        return peft.tuners.lora.Linear(base, ADAPTER_NAME, config=config, r=rank, lora_alpha=alpha)


@functools.cache
def import_peft() -> ModuleType:
    """Import PEFT without the optional packages that cannot be imported."""
    left_out: dict[str, ModuleType | None] = {}
    first: Exception | None = None
    try:
        while True:
            try:
                import peft

                return peft
            except Exception as error:
                first = first or error
                broken = next((name for name in _involved(error) if name not in NEEDED), None)
                if broken is None or broken in left_out:
                    raise ImportError(_advice(first, broken)) from first
                left_out[broken] = sys.modules.get(broken)
                sys.modules[broken] = None  # pyright: ignore[reportArgumentType]  # makes Python report it as missing
                _forget_what_is_installed(broken)
    finally:
        for name, module in left_out.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def _forget_what_is_installed(broken: str) -> None:
    """Forget PEFT's modules and what transformers and accelerate know about installed packages."""
    for name, module in list(sys.modules.items()):
        package, _, rest = name.partition(".")
        if package == "peft":
            del sys.modules[name]
        elif package in NEEDED and rest in ("utils.import_utils", "utils.imports"):
            for value in list(vars(module).values()):
                if callable(forget := getattr(value, "cache_clear", None)):
                    forget()
            if hasattr(module, f"_{broken}_available"):  # transformers 4 checks once, at import
                setattr(module, f"_{broken}_available", False)


def _advice(error: Exception, broken: str | None) -> str:
    reason = " ".join(str(error).split())[:300]
    missing = isinstance(error, ModuleNotFoundError)
    at_fault = f"The package {broken} is in the way: update or uninstall it. " if broken and not missing else ""
    return (
        f"SA-Inject needs the package peft, which cannot be imported ({type(error).__name__}: {reason}). {at_fault}"
        f'Run: "{sys.executable}" -m pip install --upgrade "{REQUIREMENT}" accelerate   Then restart ComfyUI.'
    )


def _involved(error: BaseException | None) -> Iterator[str]:
    """The packages in which an import failed: innermost first, causes before effects."""
    if error is None:
        return
    yield from _involved(error.__cause__ or error.__context__)
    if isinstance(error, ImportError) and error.name:
        yield error.name.split(".")[0]
    modules: list[str] = []
    frame = error.__traceback__ and error.__traceback__.tb_next  # after our own frame
    while frame is not None:
        modules.append(frame.tb_frame.f_globals.get("__name__", "").split(".")[0])
        frame = frame.tb_next
    yield from (name for name in reversed(modules) if name not in sys.stdlib_module_names)
