"""Names for values of ComfyUI, most of which have no class of their own there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from comfy_api.latest import io

# The values of the sockets CONDITIONING and LATENT.
Conditioning: TypeAlias = "io.Conditioning.CondList"
Latent: TypeAlias = "io.Latent.LatentDict"

# One entry of a conditioning as the sampler prepares it: tensors, areas, hooks and an id.
Cond: TypeAlias = dict[str, Any]
# Of one call of a network: patches, wrappers, noise levels, and anything that other packs put there.
TransformerOptions: TypeAlias = dict[str, Any]
# Arguments of a network or of one of its blocks, by name. Each network has others.
Arguments: TypeAlias = dict[str, Any]
# The forward of a module, with the arguments of that module.
Forward: TypeAlias = Callable[..., Any]
# ComfyUI makes its class at run time, from one for the parameterization and one for the schedule.
ModelSampling: TypeAlias = Any
# Of one text encoder, or of all: the classes share no base, and other packs wrap them.
Tokenizer: TypeAlias = Any
