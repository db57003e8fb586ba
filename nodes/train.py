"""TrainSAInjectAdapter: train an adapter on pictures of a subject."""

from __future__ import annotations

import dataclasses
import logging

from comfy_api.latest import io
from torch import Tensor

from ..core.adapter import Adapter
from ..core.image_prompt import ImagePrompt, ReferenceImage
from ..trainer.config import TrainConfig
from ..trainer.presets import AS_SET, with_preset
from ..trainer.settings import TrainingSettings
from .host.drawing.preview import SampleTexts, draw_previews, draw_samples, sample_texts
from .host.files import adapter_folder
from .host.images import encode_picture, fit_picture, split_images, to_comfy
from .host.inputs import mark_advanced
from .host.learning.training import AdapterTraining
from .host.learning.training_set import Subject
from .host.masks import keeps_something, split_masks
from .host.networks.registry import describe
from .host.provenance import Provenance
from .host.saving import check_can_save, save_or_rescue, wanted_path
from .host.text import clip_with_token
from .host.training_progress import TrainingProgress
from .sockets import CATEGORY, SA_INJECT_ADAPTER
from .train_inputs import ADVANCED, training_inputs
from .version import VERSION

log = logging.getLogger(__name__)

NAME = "Train SA-Inject Adapter"


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
            inputs=training_inputs(),
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
        encoded = SampleTexts(clip)

        def draw(adapter: Adapter) -> Tensor:
            return draw_samples(model, encoded, vae, adapter, _image_prompt(vae, subject), texts, config.seed)

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


def _previews(
    model: io.Model.Type,
    clip: io.Clip.Type,
    vae: io.Vae.Type,
    adapter: Adapter,
    subject: Subject,
    count: int,
    seed: int,
) -> Tensor:
    if count == 0:
        return to_comfy(subject.pictures[0])
    return draw_previews(model, clip, vae, adapter, _image_prompt(vae, subject), count, seed)


def _image_prompt(vae: io.Vae.Type, subject: Subject) -> ImagePrompt:
    picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "crop")
    if mask is not None and not keeps_something(mask):  # the crop removed the subject
        picture, mask = fit_picture(subject.pictures[0], subject.masks[0], subject.resolution, "pad")
    return ImagePrompt((ReferenceImage(encode_picture(vae, picture), mask),))
