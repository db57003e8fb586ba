"""All supported architectures with their default settings, and the models that are refused, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

from ....core.positions import PositionRule


@dataclass(frozen=True)
class Architecture:
    """An architecture and its default settings. Resolutions are in pixels."""

    name: str
    resolution: int  # of training
    reference_resolution: int  # of image prompts
    lora_learning_rate: float
    token_learning_rate: float
    source: str  # of the rates
    positions: PositionRule = "none"  # between a picture and its references
    is_experimental: bool = False


MEASURED = "measured on the demo's base model, and carried over"
TINY_NEXTDIT = (
    "a third of the best LoRA rate on the bench's tiny NextDiT, for larger networks; the best token rate on it"
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("SD1.x", 512, 512, 1e-3, 6e-3, MEASURED),
        Architecture("SD2.x", 768, 768, 1e-3, 6e-3, MEASURED),
        Architecture("SDXL", 1024, 1024, 1e-3, 6e-3, MEASURED),
        Architecture("Z-Image", 1024, 512, 1e-3, 3e-3, TINY_NEXTDIT, "index", True),
        Architecture("Flux.1", 1024, 512, 1e-3, 3e-3, TINY_NEXTDIT, "index", True),
        Architecture("Chroma", 1024, 512, 1e-3, 3e-3, TINY_NEXTDIT, "index", True),
        Architecture("Flux.2", 1024, 512, 1e-3, 3e-3, TINY_NEXTDIT, "index", True),
    )
}

WORKS_ON = "SD1.x, SD2.x, SDXL, Z-Image, Flux.1, Flux.2 and Chroma"

VIDEO = "it draws video, and only pictures are supported"
EDITING = "it takes reference pictures of its own"
PATCHED = "its weights or its network are another program's. Load the original model with Load Diffusion Model"
NOT_YET = "it is not supported"

# By the class name of the model, or of its network, in ComfyUI or in another pack.
REFUSED: dict[str, str] = {
    "WAN21": VIDEO,
    "WAN22": VIDEO,
    "HunyuanVideo": VIDEO,
    "HunyuanVideo15": VIDEO,
    "LTXV": VIDEO,
    "LTXAV": VIDEO,
    "CosmosVideo": VIDEO,
    "CosmosPredict2": VIDEO,
    "GenmoMochi": VIDEO,
    "SVD_img2vid": VIDEO,
    "FluxInpaint": EDITING,
    "QwenImage": EDITING,
    "Omnigen2": EDITING,
    "SD3": NOT_YET,
    "PixArt": NOT_YET,
    "AuraFlow": NOT_YET,
    "Lumina2": NOT_YET,
    "ChromaRadiance": "it draws pixels and has no latents",
    "NunchakuFluxTransformer2dModel": PATCHED,
    "ComfyFluxWrapper": PATCHED,
    "TrTUnet": PATCHED,
}


def refusal(names: list[str], reason: str | None = None) -> str:
    """The message for a model that is not supported. names: of its classes, the best known first."""
    reason = reason or next((REFUSED[name] for name in names if name in REFUSED), None)
    why = "" if reason is None else f": {reason}"
    return (
        f"SA-Inject works on {WORKS_ON}, but the connected model is {names[0]}{why}. Connect a model of one of these "
        "families."
    )
