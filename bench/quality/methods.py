"""The methods that the quality bench compares. Each trains on a subject, and returns a model that draws it.

Import only after the host has started.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demo.base.scenes import IMAGE_SIZE, caption, random_scene
from sa_inject.core.adapter import Adapter
from sa_inject.core.adapter_file import save_adapter
from sa_inject.nodes.host.files import adapter_folder
from sa_inject.nodes.host.learning import checkpoint
from sa_inject.nodes.host.networks.registry import describe

from ..measure import peak_memory
from ..reference_only import with_reference_every_step
from .drawing import sample
from .learn import (
    Trainables,
    attention_written_out,
    class_examples,
    training_setup,
    with_differences,
    with_word,
)
from .subjects import PLACEHOLDER
from .task import RANK, Method, TrainedModel, TrainingTask

CLASS_PICTURES = 16  # for prior preservation
# Of both attentions of every block of a UNet, and of every block of a NextDiT.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "attention.qkv", "attention.out")
# no references; the result is the last step
PLAIN_SETTINGS: dict[str, Any] = {
    "reference_dropout": 1.0,
    "average_power": None,
}
TRAINED_STRENGTH = 1.0  # the strength that ours is trained with
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def base_model(task: TrainingTask) -> TrainedModel:
    """The class word alone: the floor."""
    return TrainedModel(task.models.drawing, task.models.clip, task.subject.artwork.class_word)


def textual_inversion(task: TrainingTask) -> TrainedModel:
    """Gal et al., 2022: only the token embedding is trained."""
    with training_setup(task.models, task.training_subject(), task.config()) as setup:
        setup.train(Trainables([nn.Parameter(torch.zeros(1))]), lora_learning_rate=0.0, **PLAIN_SETTINGS)
        word = setup.learned_word()
    return TrainedModel(
        task.models.drawing, with_word(task.models, word, PLACEHOLDER), task.subject.phrase, *size_of(word)
    )


def untrained_reference(task: TrainingTask) -> TrainedModel:
    """Training-free reference attention, as in other packs, to the first picture, with the class word."""
    blocks = [tuple(layer.key) for layer in describe(task.models.model).layers]
    first = task.image_prompt().pictures[0].latent
    model = with_reference_every_step(task.models.drawing, [first], blocks)
    return TrainedModel(model, task.models.clip, task.subject.artwork.class_word)


def host_lora(task: TrainingTask) -> TrainedModel:
    """ComfyUI's TrainLoraNode: LoRA on every layer. The captions contain a rare word, which is not trained."""
    host, models = task.host, task.models
    latents = host.execute("VAEEncode", pixels=task.pictures(), vae=models.vae)[0]["samples"]
    captions = task.subject.captions(task.subject.phrase)
    positive = [host.execute("CLIPTextEncode", clip=models.clip, text=text)[0] for text in captions]
    _, lora, *_ = host.execute(
        "TrainLoraNode",
        model=models.model,
        latents=[{"samples": latent[None]} for latent in latents],
        positive=positive,
        steps=task.settings.steps,
        batch_size=task.settings.batch,
        learning_rate=task.rate,
        rank=RANK,
        training_dtype=PRECISIONS[models.dtype],
        lora_dtype="fp32",
        gradient_checkpointing=False,
        seed=task.settings.seed,
    )
    lora = {name: tensor.detach().half() for name, tensor in lora.items()}
    model = host.execute("LoraModelLoader", model=models.drawing, lora=lora, strength_model=1.0)[0]
    return TrainedModel(model, models.clip, task.subject.phrase, *size_of(lora))


def peft_lora(task: TrainingTask) -> TrainedModel:
    """LoRA on all attention of the UNet with a trained token, as in pivotal tuning."""
    with training_setup(task.models, task.training_subject(), task.config()) as setup:
        targets = [name for name, _ in setup.unet.named_modules() if name.endswith(ATTENTION)]
        torch.manual_seed(task.settings.seed)
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), setup.unet)
        layers = {name: setup.unet.get_submodule(name) for name in targets}
        try:
            learned = {name: p for name, p in setup.unet.named_parameters() if "lora_" in name}
            setup.train(Trainables(list(learned.values())), **PLAIN_SETTINGS)
            with torch.no_grad():
                differences = {f"{name}.weight": lora.get_delta_weight("default") for name, lora in layers.items()}
            kept = {name: p.detach().clone() for name, p in learned.items()}
        finally:
            for name, lora in layers.items():
                parent, _, child = name.rpartition(".")
                setattr(setup.unet.get_submodule(parent), child, lora.base_layer)
        word = setup.learned_word()
    return TrainedModel(
        with_differences(task.models, differences),
        with_word(task.models, word, PLACEHOLDER),
        task.subject.phrase,
        *size_of({**kept, **word}),
    )


def full_fine_tune(task: TrainingTask) -> TrainedModel:
    """DreamBooth without prior preservation, with a trained token."""
    return fine_tuned(task, ())


def full_fine_tune_with_prior(task: TrainingTask) -> TrainedModel:
    """DreamBooth (Ruiz et al., 2023, eq. 2), with class pictures that the base model drew."""
    rng = np.random.RandomState(task.settings.seed)
    scenes = [random_scene(rng) for _ in range(CLASS_PICTURES)]
    texts = [caption(scene, 0, task.subject.artwork.class_word) for scene in scenes]
    latents = sample(task, base_model(task), texts, 1, range(len(texts)))
    return fine_tuned(task, tuple(zip(latents, texts, strict=True)))


def fine_tuned(task: TrainingTask, prior: Sequence[tuple[Tensor, str]]) -> TrainedModel:
    extra = class_examples(task.models, torch.stack([p[0] for p in prior]), [p[1] for p in prior]) if prior else []
    with training_setup(task.models, task.training_subject(), task.config(), extra) as setup:
        before = {name: p.detach().clone() for name, p in setup.unet.named_parameters()}
        setup.unet.requires_grad_(True)
        setup.train(Trainables(list(setup.unet.parameters())), **PLAIN_SETTINGS)
        differences = {name: p.detach().cpu() - before[name].cpu() for name, p in setup.unet.named_parameters()}
        word = setup.learned_word()
    return TrainedModel(
        with_differences(task.models, differences),
        with_word(task.models, word, PLACEHOLDER),
        task.subject.phrase,
        *size_of({**differences, **word}),
    )


def ours(task: TrainingTask, **changes: Any) -> TrainedModel:
    """The pack's own nodes, with their defaults and the swept rates. `changes` are inputs of the training node."""
    return trained_model(task, *learned_adapter(task, **changes))


def learned_adapter(task: TrainingTask, **changes: Any) -> tuple[Adapter, Any]:
    """The result of TrainSAInjectAdapter: adapter and CLIP."""
    host, models = task.host, task.models
    chosen: dict[str, Any] = {
        "placeholder_token": PLACEHOLDER,
        "class_word": task.subject.artwork.class_word,
        "resolution": IMAGE_SIZE,
        "steps": task.settings.steps,
        "batch_size": task.settings.batch,
        "lora_learning_rate": task.rate,
        "token_learning_rate": task.word_rate,
        "rank": RANK,
        "precision": PRECISIONS[models.dtype],
        "seed": task.settings.seed,
        "file_name": "bench",
        "previews": 0,
        "sample_every": 0,
    }
    forget_trainings()
    chosen |= {**changes, **({"alpha": float(changes["rank"])} if "rank" in changes else {})}
    adapter, clip, *_ = host.execute(
        "TrainSAInjectAdapter",
        model=models.model,
        clip=models.clip,
        vae=models.vae,
        images=task.pictures(),
        captions=task.subject.captions(task.subject.phrase),
        **chosen,
    )
    return adapter, clip


def forget_trainings() -> None:
    """The pack does not repeat a training that it has kept. It cannot see what an ablation replaces in it."""
    shutil.rmtree(Path(adapter_folder()) / checkpoint.FOLDER, ignore_errors=True)


def ours_noised(task: TrainingTask) -> TrainedModel:
    return ours(task, reference_mode="noised")


def as_trained(mode: str) -> Callable[[TrainingTask], TrainedModel]:
    """Our method, applied at the strength of the training."""
    return lambda task: trained_model(task, *learned_adapter(task, reference_mode=mode), strength=TRAINED_STRENGTH)


def trained_model(task: TrainingTask, adapter: Adapter, clip: Any, **changes: Any) -> TrainedModel:
    """`changes` are inputs of ApplySelfAttnInjection."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_adapter(adapter, path)
        file_bytes = path.stat().st_size
    parameters = sum(t.numel() for t in (*adapter.lora.state_dict().values(), *adapter.token_embedding.values()))
    return TrainedModel(injected(task, adapter, **changes), clip, task.subject.phrase, parameters, file_bytes)


def injected(task: TrainingTask, adapter: Adapter, **changes: Any) -> Any:
    if task.strength is not None:
        changes = {"strength": task.strength, **changes}
    return task.host.execute(
        "ApplySelfAttnInjection",
        model=task.models.drawing,
        adapter=adapter,
        image_prompt=task.image_prompt(),
        **changes,
    )[0]


def size_of(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Number of values, and bytes of a float16 file of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "learned.safetensors"
        save_file({name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}, path)
        return sum(tensor.numel() for tensor in tensors.values()), path.stat().st_size


def timed(task: TrainingTask, method: Method) -> tuple[TrainedModel, float, int]:
    """Train, and measure the time and the peak of added memory in bytes."""
    start = time.perf_counter()
    with peak_memory() as peak, attention_written_out():
        trained = method.train(task)
    return trained, time.perf_counter() - start, peak.added


def with_words(*rates: float) -> tuple[tuple[float, float], ...]:
    """Each LoRA rate with each token rate."""
    return tuple((rate, word) for word in (2e-3, 6e-3) for rate in rates)


METHODS: dict[str, Method] = {
    "base": Method(base_model),
    "textual inversion": Method(textual_inversion, ((0.0, 1e-3), (0.0, 3e-3), (0.0, 1e-2))),
    "reference attention, untrained": Method(untrained_reference),
    "TrainLoraNode": Method(host_lora, ((1e-3, 0.0), (3e-3, 0.0), (1e-2, 0.0))),
    "PEFT LoRA": Method(peft_lora, with_words(3e-4, 1e-3, 3e-3)),
    "full fine-tune": Method(full_fine_tune, with_words(1e-5, 3e-5, 1e-4)),
    "full fine-tune, prior": Method(full_fine_tune_with_prior, swept_as="full fine-tune"),
    "ours, clean": Method(ours, with_words(3e-4, 1e-3, 3e-3)),
    "ours, noised": Method(ours_noised, swept_as="ours, clean"),
    "ours, clean, strength 1": Method(as_trained("clean"), swept_as="ours, clean"),
    "ours, noised, strength 1": Method(as_trained("noised"), swept_as="ours, clean"),
}
