"""The inputs of TrainSAInjectAdapter. They have fixed names; new ones come last and are optional."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.adapter import REFERENCE_MODES
from ..trainer.presets import AS_SET, PRESETS
from .host.images import SIZE_MULTIPLE
from .host.learning.training_models import PRECISIONS
from .sockets import SA_INJECT_ADAPTER, SA_INJECT_TRAINING_SETTINGS

ADVANCED = (
    "lora_learning_rate",
    "token_learning_rate",
    "token_vectors",
    "batch_size",
    "gradient_accumulation",
    "rank",
    "alpha",
    "reference_mode",
    "precision",
    "gradient_checkpointing",
    "seed",
    "previews",
)


def training_inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip="The base model: SD1.x, SD2.x or SDXL, or experimentally Z-Image, Flux.1, Flux.2 or "
            "Chroma. Its weights are not changed.",
        ),
        io.Clip.Input("clip", tooltip="The CLIP of the base model. It is not changed."),
        io.Vae.Input("vae", tooltip="The VAE of the base model."),
        io.Image.Input(
            "images",
            tooltip="Pictures of the subject: a batch, or a list of different sizes from a dataset "
            "node. 3 to 10 are best. From one picture alone, augmented views are made; the "
            "subject is then less flexible in prompts.",
        ),
        io.String.Input(
            "placeholder_token",
            default="sainj",
            tooltip="The made-up word that names the subject in prompts, such as sainj. Without spaces, "
            "commas, colons, parentheses and braces. A word of the text encoder's vocabulary is "
            "refused. Upper and lower case are the same.",
        ),
        io.String.Input(
            "class_word",
            default="toy",
            tooltip="What the subject is, in one or two words: dog, toy, woman, car. The token "
            "embedding starts as the embedding of this word.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=SIZE_MULTIPLE,
            max=2048,
            step=SIZE_MULTIPLE,
            tooltip="Training size in pixels. Each picture keeps its aspect ratio and is scaled to "
            "about this number squared. 512 for SD1.x, 768 for SD2.x, 1024 for the others. Higher: "
            "more detail, more time and memory.",
        ),
        io.Int.Input(
            "steps",
            default=400,
            min=1,
            max=100_000,
            tooltip="Number of optimizer steps. 200 to 1000 is useful. Low: less likeness. High: the "
            "backgrounds of the pictures are learned too (overfitting).",
        ),
        io.Float.Input(
            "lora_learning_rate",
            default=1e-3,
            min=0.0,
            max=1.0,
            step=1e-6,
            tooltip="Learning rate of the LoRA. 1e-4 to 3e-3 is useful. 0: the LoRA is not trained. "
            "Low: less likeness. Far above: pictures become noise.",
        ),
        io.Float.Input(
            "token_learning_rate",
            default=6e-3,
            min=0.0,
            max=1.0,
            step=1e-6,
            tooltip="Learning rate of the token embedding. 5e-4 to 1e-2 is useful. 0: the class word's "
            "embedding is kept. Too high: the rest of the prompt is ignored.",
        ),
        io.Int.Input(
            "token_vectors",
            default=4,
            min=1,
            max=16,
            tooltip="Number of tokens that are trained for the subject. 1 to 8 is useful. More tokens "
            "hold more detail and take more of a prompt's 75 tokens.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Pictures in one forward pass. 1 to 4 is useful. Higher: a steadier gradient, and "
            "more memory and time for each step. Pictures of different sizes run one after "
            "another.",
        ),
        io.Int.Input(
            "gradient_accumulation",
            default=1,
            min=1,
            max=64,
            tooltip="Batches for each optimizer step. 1 to 8 is useful. Higher: the effect of a larger "
            "batch without its memory; time grows in proportion.",
        ),
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=128,
            tooltip="Rank of the LoRA. 4 to 64 is useful. Low: a small file, less detail. High: more "
            "detail, and overfitting sooner. One rank takes about 0.1 MB of the file with SD1.x "
            "and 0.7 MB with SDXL.",
        ),
        io.Float.Input(
            "alpha",
            default=16.0,
            min=0.1,
            max=512.0,
            step=0.1,
            tooltip="Scale of the LoRA: its weights are multiplied by alpha / rank. Usual: equal to "
            "rank. Lower: weaker updates, as with a lower learning rate. Higher: stronger "
            "updates.",
        ),
        io.Combo.Input(
            "reference_mode",
            options=list(REFERENCE_MODES),
            default="clean",
            tooltip="How the reference is encoded in training and in sampling. clean: without noise, "
            "once for a sampling run; sampling is fast. noised: with the noise of the step, at "
            "every step; sampling is slower, and the likeness is slightly better.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            tooltip="Number format of the computation. The trained weights are always float32. auto: "
            "the model's own format. bf16: fast on recent cards. fp16: for cards without bf16. "
            "fp32: exact, twice the memory.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            tooltip="Recompute activations instead of storing them. On: less memory, most of all at "
            "high resolutions, and slower steps. Off: faster. The result is the same.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,  # a new seed for each run would train again
            tooltip="Random seed of the training. The same seed and settings give the same adapter on "
            "the same machine.",
        ),
        io.String.Input(
            "file_name",
            default="sainj",
            tooltip="Name of the file in models/sa_inject. Use / for a sub-folder, which may be a link "
            "to another disk. No file is overwritten: a number is added to the name.",
        ),
        io.Int.Input(
            "previews",
            default=1,
            min=0,
            max=8,
            tooltip="Number of pictures to draw with the finished adapter, in 20 steps each. 0: none; "
            "the output is then the first training picture. More: more time after training.",
        ),
        io.String.Input(
            "captions",
            optional=True,
            force_input=True,
            tooltip="One text for each picture, or one for all. Use the placeholder token where the "
            "subject is named. Describe what is not the subject (place, pose, light), so that "
            "it is not learned. Not connected: neutral captions are used.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="White where the subject is, one mask for each picture, in its size. The loss and "
            "the image prompt use only this part. The masks of Load SA-Inject Dataset are right "
            "as they are. The mask of LoadImage is inverted: put InvertMask between. Not "
            "connected: the whole picture is used.",
        ),
        io.Int.Input(
            "sample_every",
            default=100,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Steps between sample pictures, drawn while it trains, besides one before the first step "
            "and one at the end. 50 to 250 is useful. A picture takes as long as about ten steps. 0: none.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default=AS_SET,
            optional=True,
            tooltip="A named set of other inputs, which then count instead of what is set here: steps, rank, "
            "alpha and reference_mode. quick: 200 steps, to try. balanced: 400. thorough: 1000 steps and the "
            "reference mode noised, to keep. as set: every input as it is.",
        ),
        SA_INJECT_TRAINING_SETTINGS.Input(
            "settings",
            optional=True,
            tooltip="More settings, from SA-Inject Training Settings. Not connected: its defaults.",
        ),
        SA_INJECT_ADAPTER.Input(
            "adapter",
            optional=True,
            tooltip="An adapter of the same kind of model to begin with, from Load SA-Inject Adapter. A new "
            "training starts from its values; its rank, alpha and token_vectors replace those set here. An "
            "initial_embedding in the settings replaces its word. Not connected: the training starts from nothing.",
        ),
    ]
