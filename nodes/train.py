"""TrainSAInjectAdapter: pictures of a subject become an adapter, in the graph, on the host's device."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.adapter import REFERENCE_MODES
from ..core.image_prompt import ImagePrompt, ReferenceImage
from ..trainer.config import TrainConfig
from .host.adapter_index import warn_of_adapters_with
from .host.drawing.preview import draw_previews
from .host.files import adapter_folder
from .host.images import SIZE_MULTIPLE, encode_picture, fit_picture, split_images, to_comfy
from .host.learning.training import PRECISIONS, train_adapter
from .host.learning.training_set import Subject
from .host.masks import keeps_something, split_masks
from .host.networks.unet import describe
from .host.progress import TrainingProgress
from .host.provenance import Provenance
from .host.saving import check_can_save, save_or_rescue, wanted_path
from .host.text import clip_with_token
from .sockets import CATEGORY, SA_INJECT_ADAPTER
from .version import VERSION

NAME = "Train SA-Inject Adapter"


class TrainSAInjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainSAInjectAdapter",
            display_name=NAME,
            category=CATEGORY,
            description="Teaches the model a new subject from a few pictures and saves it to models/sa_inject. "
            "The model itself is not changed. Cancelled, it goes on from there when the same is queued again.",
            is_input_list=True,  # so that pictures of different sizes can come as a list
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model: an SD1.x, SD2.x or SDXL checkpoint."),
                io.Clip.Input("clip", tooltip="The CLIP of the base model."),
                io.Vae.Input("vae", tooltip="The VAE of the base model."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures of the subject, 3 to 10 are best: a batch, or a list of different sizes from "
                    "a dataset node. One alone works through augmented views of itself, with less freedom later.",
                ),
                io.String.Input(
                    "placeholder_token",
                    default="sainj",
                    tooltip="The made-up word that will name the subject in prompts. It must not be a word of its own "
                    "in the text encoder; the case of letters does not matter.",
                ),
                io.String.Input(
                    "class_word",
                    default="toy",
                    tooltip="What the subject is, in a word or two: dog, toy, woman, car. The learned word starts "
                    "from its meaning.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=SIZE_MULTIPLE,
                    max=2048,
                    step=SIZE_MULTIPLE,
                    tooltip="Training size in pixels: each picture keeps its aspect and gets about this many pixels "
                    "squared. 512 for SD1.x, 768 for SD2.x, 1024 for SDXL. Time and memory grow faster than the area.",
                ),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=100_000,
                    tooltip="Optimizer steps. 200 gives a likeness, 400 to 1000 are usual; far more overfits to the "
                    "pictures' backgrounds.",
                ),
                io.Float.Input(
                    "lora_learning_rate",
                    default=1e-3,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    tooltip="Step size of the LoRA. 1e-4 to 3e-3 is useful. With 400 steps on the demo's base model, "
                    "1e-3 and 6e-3 for the word scored best (0.80 of 1), 1e-4 and 5e-4 least (0.76). 0 freezes it; "
                    "far above gives noise.",
                ),
                io.Float.Input(
                    "token_learning_rate",
                    default=6e-3,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    tooltip="Step size of the learned word. 5e-4 to 1e-2 is useful; 0 keeps the class word's meaning; "
                    "too high makes the word ignore the rest of the prompt.",
                ),
                io.Int.Input(
                    "token_vectors",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="How many of a prompt's 75 tokens the learned word takes. 1 learns least; 4 hold far more "
                    "of a subject (likeness 0.53 against 0.34 where it was tried); 8 held no more than 4.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures for each forward pass. More is steadier and needs more memory. Pictures of "
                    "different sizes are run one after another.",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Batches for each optimizer step: the effect of a larger batch at the memory of a small "
                    "one, at proportionally more time.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=128,
                    tooltip="Rank of the LoRA. 4 to 64 is useful; the file is about 0.1 MB for each rank with SD1.x "
                    "and 0.7 MB with SDXL. Higher can hold more detail and overfits sooner: in the benchmark, 4 came "
                    "out 0.01 below 16, 64 and 1 0.02 (of 0.84).",
                ),
                io.Float.Input(
                    "alpha",
                    default=16.0,
                    min=0.1,
                    max=512.0,
                    step=0.1,
                    tooltip="LoRA scale: the update is multiplied by alpha / rank. Equal to the rank is neutral; half "
                    "of it acts like half the learning rate.",
                ),
                io.Combo.Input(
                    "reference_mode",
                    options=list(REFERENCE_MODES),
                    default="clean",
                    tooltip="How the image prompt is read. clean: free of noise, once for a whole sampling run, so "
                    "drawing stays fast. noised: noised to each step's level, once for every step: drawing takes "
                    "1.1 to 1.4 times as long as with clean, and the subject is met better (0.803 against 0.781 in the "
                    "benchmark, mean of twelve subjects; a full fine-tune has 0.818).",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Precision of the computation; what is learned is always float32. auto: the model's own. "
                    "bf16: fast on newer cards. fp16: for older cards. fp32: exact, twice the memory.",
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=False,
                    tooltip="Recomputes activations instead of keeping them: less memory, most so at high "
                    "resolutions, and about a quarter slower. The result is the same.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,  # a new seed at every queueing would train anew each time
                    tooltip="Start of everything random in the training. The same seed and settings give the same "
                    "adapter on the same machine.",
                ),
                io.String.Input(
                    "file_name",
                    default="sainj",
                    tooltip="Name of the file in models/sa_inject; use / for a sub-folder. A file that exists is "
                    "never overwritten: a number is added.",
                ),
                io.Int.Input(
                    "previews",
                    default=1,
                    min=0,
                    max=8,
                    tooltip="How many pictures to draw with the finished adapter, 20 steps each. 0 draws none and "
                    "hands back the first training picture.",
                ),
                io.String.Input(
                    "captions",
                    optional=True,
                    force_input=True,
                    tooltip="One text for each picture, or one for all, with the placeholder where the subject is "
                    "named. Say what is not the subject (place, pose, light), so that it is not learned. Left open, "
                    "neutral captions are used.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White where the subject is, one mask for each picture, of its size. Learning counts only "
                    "there, and only that part serves as image prompt. Load SA-Inject Dataset gives such masks; "
                    "LoadImage's is the other way round: put InvertMask between.",
                ),
            ],
            outputs=[
                SA_INJECT_ADAPTER.Output(display_name="adapter"),
                io.Clip.Output(display_name="clip"),
                io.Custom("LOSS_MAP").Output(display_name="loss_map"),
                io.Image.Output(display_name="previews"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(cls, model, clip, vae, images, captions=None, masks=None, **settings) -> io.NodeOutput:
        model, clip, vae = model[0], clip[0], vae[0]
        for name, part in (("clip", clip), ("vae", vae)):
            if part is None:
                raise ValueError(
                    f"The checkpoint has no {name.upper()}. Connect one of the same base model to '{name}'."
                )
        chosen = {name: value[0] for name, value in settings.items()}
        path = wanted_path(chosen["file_name"])
        pictures = split_images(images, NAME)
        subject = Subject(
            pictures=pictures,
            masks=split_masks(masks, pictures, NAME),
            captions=captions,
            placeholder_token=chosen["placeholder_token"].strip(),
            class_word=chosen["class_word"].strip(),
            resolution=chosen["resolution"],
        )
        config = TrainConfig(
            steps=chosen["steps"],
            batch_size=chosen["batch_size"],
            gradient_accumulation=chosen["gradient_accumulation"],
            lora_learning_rate=chosen["lora_learning_rate"],
            token_learning_rate=chosen["token_learning_rate"],
            token_vectors=chosen["token_vectors"],
            rank=chosen["rank"],
            alpha=chosen["alpha"],
            reference_mode=chosen["reference_mode"],
            seed=chosen["seed"],
        )
        check_can_save(path, describe(model).layers, config.rank)
        warn_of_adapters_with(subject.placeholder_token)
        progress = TrainingProgress(config.steps, cls.hidden.unique_id)
        adapter, losses = train_adapter(
            model,
            clip,
            vae,
            subject,
            config,
            precision=chosen["precision"],
            checkpointing=chosen["gradient_checkpointing"],
            name=path.stem,
            folder=adapter_folder(),
            on_step=progress.update,
        )
        provenance = Provenance(cls.hidden.prompt, cls.hidden.extra_pnginfo, VERSION, thumbnail=pictures[0])
        adapter, text = save_or_rescue(adapter, path, provenance)
        progress.say(text)
        patched_clip = clip_with_token(clip, adapter.info.placeholder_token, adapter.token_embedding)
        previews = _previews(model, clip, vae, adapter, subject, chosen["previews"], config.seed)
        return io.NodeOutput(adapter, patched_clip, {"loss": losses}, previews)


def _previews(model, clip, vae, adapter, subject, count, seed):
    if count == 0:
        return to_comfy(subject.pictures[0])
    picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "crop")
    if mask is not None and not keeps_something(mask):  # the subject lies where the square was cut off
        picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "pad")
    prompt = ImagePrompt((ReferenceImage(encode_picture(vae, picture), mask),))
    return draw_previews(model, clip, vae, adapter, prompt, count, seed)
