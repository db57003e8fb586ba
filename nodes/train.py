"""TrainSAInjectAdapter: train an adapter on pictures of a subject."""

from __future__ import annotations

import dataclasses
import logging

from comfy_api.latest import io

from ..core.adapter import REFERENCE_MODES
from ..core.image_prompt import ImagePrompt, ReferenceImage
from ..trainer.config import TrainConfig
from ..trainer.presets import AS_SET, PRESETS, with_preset
from ..trainer.settings import TrainingSettings
from .host.drawing.preview import draw_previews, draw_samples, sample_texts
from .host.files import adapter_folder
from .host.images import SIZE_MULTIPLE, encode_picture, fit_picture, split_images, to_comfy
from .host.inputs import mark_advanced
from .host.learning.training import AdapterTraining
from .host.learning.training_models import PRECISIONS
from .host.learning.training_set import Subject
from .host.masks import keeps_something, split_masks
from .host.networks.registry import describe
from .host.provenance import Provenance
from .host.saving import check_can_save, save_or_rescue, wanted_path
from .host.text import clip_with_token
from .host.training_progress import TrainingProgress
from .sockets import CATEGORY, SA_INJECT_ADAPTER, SA_INJECT_TRAINING_SETTINGS
from .version import VERSION

log = logging.getLogger(__name__)

NAME = "Train SA-Inject Adapter"
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


class TrainSAInjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="TrainSAInjectAdapter",
            display_name=NAME,
            category=CATEGORY,
            description="Trains an adapter for a new subject on a few pictures and saves it to "
            "models/sa_inject. The model is not changed. If training is cancelled, queue the "
            "same again: it resumes.",
            is_input_list=True,  # so that pictures of different sizes can come as a list
            is_output_node=True,
            inputs=[
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
                    "every step; sampling is slower, and the likeness is better.",
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
                    control_after_generate=False,  # a new seed at each queueing would train again
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
                    "training starts from its values; its rank, alpha and token_vectors replace those set here. Not "
                    "connected: the training starts from nothing.",
                ),
            ],
            outputs=[
                SA_INJECT_ADAPTER.Output(
                    display_name="adapter", tooltip="The trained adapter, for Apply Self-Attention Injection."
                ),
                io.Clip.Output(
                    display_name="clip", tooltip="The CLIP with the placeholder token, for CLIP Text Encode."
                ),
                io.Custom("LOSS_MAP").Output(
                    display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."
                ),
                io.Image.Output(display_name="previews", tooltip="Pictures drawn with the finished adapter."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="All sample pictures as one: a row for each step, a column for each prompt. Without "
                    "samples it is the first training picture.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )
        mark_advanced(schema, ADVANCED)
        return schema

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        captions=None,
        masks=None,
        sample_every=(0,),
        preset=(AS_SET,),
        settings=None,
        adapter=None,
        **inputs,
    ) -> io.NodeOutput:
        model, clip, vae = model[0], clip[0], vae[0]
        for name, part in (("clip", clip), ("vae", vae)):
            if part is None:
                raise ValueError(
                    f"The checkpoint has no {name.upper()}. Connect one of the same base model to '{name}'."
                )
        chosen = with_preset({name: value[0] for name, value in inputs.items()}, preset[0])
        more: TrainingSettings = settings[0] if settings else TrainingSettings()
        path = wanted_path(chosen["file_name"])
        pictures = split_images(images, NAME)
        subject = Subject(
            pictures=pictures,
            masks=split_masks(masks, pictures, NAME),
            captions=captions,
            placeholder_token=chosen["placeholder_token"].strip(),
            class_word=chosen["class_word"].strip(),
            resolution=chosen["resolution"],
            class_pictures=split_images(more.class_images, NAME) if more.class_images else (),
            initial_embedding=more.initial_embedding,
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
            **more.for_config(),
        )
        check_can_save(path, describe(model).layers, config.rank)
        if more.sample_every == 0:
            more = dataclasses.replace(more, sample_every=sample_every[0])
        texts = sample_texts(more.sample_prompts, subject.placeholder_token, subject.class_word)

        def draw(adapter):
            return draw_samples(model, clip, vae, adapter, _image_prompt(vae, subject), texts, config.seed)

        progress = TrainingProgress(
            config.steps,
            cls.hidden.unique_id,
            name=path.relative_to(adapter_folder()).with_suffix("").as_posix(),
            words=(subject.placeholder_token, subject.class_word),
            settings=more,
            prompts=texts,
            draw=draw,
        )
        with progress:
            progress.enter("encoding")
            training = AdapterTraining(
                model,
                clip,
                vae,
                subject,
                config,
                precision=chosen["precision"],
                checkpointing=chosen["gradient_checkpointing"],
                hold_out=more.hold_out,
                begin_with=adapter[0] if adapter else None,
            )
            with training.prepare():
                losses = training.run(adapter_folder(), progress)
                trained = training.build(path.stem)
            log.info("Trained adapter '%s': %d steps, final loss %.4f.", trained.name, len(losses), losses[-1])
            provenance = Provenance(cls.hidden.prompt, cls.hidden.extra_pnginfo, VERSION, thumbnail=pictures[0])
            trained, text = save_or_rescue(trained, path, provenance)
            progress.finished(text)
        patched_clip = clip_with_token(clip, trained.info.placeholder_token, trained.token_embedding)
        previews = _previews(model, clip, vae, trained, subject, chosen["previews"], config.seed)
        sheet = progress.sheet()
        samples = to_comfy(subject.pictures[0]) if sheet is None else sheet
        return io.NodeOutput(trained, patched_clip, {"loss": losses}, previews, samples, ui=progress.ui())


def _previews(model, clip, vae, adapter, subject, count, seed):
    if count == 0:
        return to_comfy(subject.pictures[0])
    return draw_previews(model, clip, vae, adapter, _image_prompt(vae, subject), count, seed)


def _image_prompt(vae, subject):
    picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "crop")
    if mask is not None and not keeps_something(mask):  # the crop has cut off the subject
        picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "pad")
    return ImagePrompt((ReferenceImage(encode_picture(vae, picture), mask),))
