"""SAInjectTrainingSettings: optional settings of the training node."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..trainer.optimizers import PRODIGY_COMMAND, available_optimizers, check_optimizer
from ..trainer.options import FLOW_WEIGHTINGS, SCHEDULES, TrainOptions
from ..trainer.settings import NEVER, TrainingSettings, prompt_lines
from .host.embeddings import CLASS_WORD, check_embedding_file, embedding_files
from .sockets import CATEGORY, SA_INJECT_TRAINING_SETTINGS

MOST_STEPS = 100_000


class SAInjectTrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SAInjectTrainingSettings",
            display_name="SA-Inject Training Settings",
            category=CATEGORY,
            description="Optional: more settings for Train SA-Inject Adapter. As they come, they change nothing.",
            is_input_list=True,  # so that class pictures of different sizes can come as a list
            inputs=[
                io.Int.Input(
                    "sample_every",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    tooltip="Steps between sample pictures. 50 to 250 is useful. Low shows more and takes longer: one "
                    "picture takes as long as about ten steps. 0 leaves it to the training node's own sample_every.",
                ),
                io.String.Input(
                    "sample_prompts",
                    default="",
                    multiline=True,
                    tooltip="What the samples show, one prompt a line. Write the placeholder token, or [trigger], "
                    "where the subject is named. Two or three prompts are useful; each takes its own time. Left "
                    "empty, it is 'a photo of' the subject.",
                ),
                io.Int.Input(
                    "kept",
                    default=4,
                    min=0,
                    max=100,
                    tooltip="How many adapters to keep besides the finished one: those of the last samples. Load "
                    "lists them under the adapter's name. 3 to 10 is useful. 0 keeps none; many take room on disk.",
                ),
                io.Int.Input(
                    "validation_every",
                    default=0,
                    min=NEVER,
                    max=MOST_STEPS,
                    tooltip="Steps between measurements of the loss at fixed pictures, noise and noise levels. 25 to "
                    "100 is useful; low takes longer. 0 measures at every sample, -1 never.",
                ),
                io.Boolean.Input(
                    "hold_out",
                    default=False,
                    tooltip="Measure the validation loss at a picture that is not learned. It needs six pictures or "
                    "more, and costs one of them. On shows overfitting; off measures at all pictures.",
                ),
                io.Int.Input(
                    "save_every",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    tooltip="Steps after which the state is saved, from which a training goes on after a crash. It is "
                    "saved every five minutes in any case. 10 to 100 is useful where steps are slow; low writes to "
                    "the disk often. 0 adds nothing.",
                ),
                io.Combo.Input(
                    "optimizer",
                    options=available_optimizers(),
                    default="adamw",
                    optional=True,
                    tooltip="adamw: uses the two learning rates. prodigy: finds one learning rate for both by itself, "
                    "for models where no good one is known; a rate of 0 still freezes its part. It is offered only "
                    f"where it is installed: {PRODIGY_COMMAND}",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    optional=True,
                    tooltip="How the learning rates go over the steps. constant: they stay, and more steps may be "
                    "added later. cosine and linear: they fall towards 0 at the last step, so that more steps are "
                    "another training. Useful with high rates.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    optional=True,
                    tooltip="Steps in which the learning rates rise to their value. 5 to 10 % of the steps is useful "
                    "where the first steps spoil something. 0: none. As many as there are steps: the rates never "
                    "get there, and less is learned.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=1e-2,
                    min=0.0,
                    max=10.0,
                    step=1e-3,
                    optional=True,
                    tooltip="How much each step pulls the LoRA towards 0, times its learning rate. 0 to 0.1 is useful. "
                    "0: not at all. Above 1: little likeness. The token embedding has none.",
                ),
                io.Float.Input(
                    "max_gradient_norm",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.01,
                    optional=True,
                    tooltip="Longest gradient of a step; a longer one is shortened to it. 0.1 to 10 is useful. Low: "
                    "single odd pictures change little. High, or 0 for no limit: they count in full.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Prior preservation: how much it counts that other things of the class stay as they are. "
                    "0.1 to 1 is useful, and a step takes about twice the time. 0: off. High: the class is safe "
                    "beside an image prompt, and the likeness is lower.",
                ),
                io.Float.Input(
                    "caption_dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of examples with an empty caption, from which the image prompt learns alone. 0 to "
                    "0.2 is useful. 0: none. 1: all of them, and the token embedding is not trained.",
                ),
                io.Boolean.Input(
                    "horizontal_flips",
                    default=False,
                    optional=True,
                    tooltip="Mirror half of the pictures, with their masks. On: more variety from few pictures. Off: "
                    "right for letters, faces, and everything whose sides differ.",
                ),
                io.Float.Input(
                    "random_crops",
                    default=0.0,
                    min=0.0,
                    max=0.75,
                    step=0.01,
                    optional=True,
                    tooltip="Share of each side that a training picture leaves out, at a random place. 0.1 to 0.3 is "
                    "useful: the subject is not learned at one place and size. 0: whole pictures. 0.75: a sixteenth "
                    "of the picture, mostly parts of the subject. Image prompts stay whole.",
                ),
                io.Float.Input(
                    "color_jitter",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    optional=True,
                    tooltip="How far brightness, contrast and saturation of an image prompt may change, as a share. "
                    "0.1 to 0.3 is useful: light and white balance are then not copied. 0: off. 0.9: nearly black, "
                    "grey or glaring, and colours are learned from the word alone.",
                ),
                io.Float.Input(
                    "background_weight",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="How much the loss counts what lies outside a mask. 0 to 0.3 is useful. 0: not at all. "
                    "1: as much as the subject. It does nothing without masks.",
                ),
                io.Float.Input(
                    "min_snr_gamma",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Min-SNR weighting (Hang et al., 2023): noise levels with a signal-to-noise ratio above it "
                    "count less. 5 is the paper's value, 1 to 20 is useful. 0: off. Near 0: almost only high noise, "
                    "so layout and no detail. High: as off, for a model that predicts noise.",
                ),
                io.Boolean.Input(
                    "keep_token_norm",
                    default=False,
                    optional=True,
                    tooltip="Keep the length of the token embedding's vectors as it is at the start. On: the word "
                    "does not drown the rest of a prompt, at high token learning rates too. Off: it is free.",
                ),
                io.Float.Input(
                    "token_freeze_after",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the steps after which the token embedding stays as it is, and steps are faster. "
                    "0.3 to 1 is useful. 1: it is trained to the end. 0: it stays the class word's. Below 1, more "
                    "steps are another training.",
                ),
                io.Combo.Input(
                    "initial_embedding",
                    options=[CLASS_WORD, *embedding_files()],
                    default=CLASS_WORD,
                    optional=True,
                    tooltip="What the token embedding is at the start: the class word's, or an embedding file from "
                    "models/embeddings. The number of vectors is then the file's, and token_vectors does not count. "
                    "Where the training begins with an adapter, a file replaces its word.",
                ),
                io.Image.Input(
                    "class_images",
                    optional=True,
                    tooltip="Pictures of other things of the class, 10 to 200 of them, for prior_weight. Not "
                    "connected: what the model itself draws for the class word is kept, without any pictures.",
                ),
                io.Combo.Input(
                    "flow_weighting",
                    options=list(FLOW_WEIGHTINGS),
                    default="uniform",
                    optional=True,
                    tooltip="Which noise levels count more, for flow models such as Z-Image and Flux; others are "
                    "refused. uniform: all alike. logit_normal: those in the middle, as SD3 was trained. cosmap: the "
                    "middle a little more, up to twice. sigma_sqrt: almost only the lowest noise, so fine detail.",
                ),
            ],
            outputs=[
                SA_INJECT_TRAINING_SETTINGS.Output(
                    display_name="settings", tooltip="For settings of Train SA-Inject Adapter."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, optimizer=None, initial_embedding=None) -> bool | str:
        """Replaces the host's check, which only reports 'not in list'."""
        try:
            for chosen in optimizer or ():
                check_optimizer(chosen)
            for chosen in initial_embedding or ():
                if chosen != CLASS_WORD:
                    check_embedding_file(chosen)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, class_images=(), **inputs) -> io.NodeOutput:
        chosen = {name: value[0] for name, value in inputs.items()}
        chosen["sample_prompts"] = prompt_lines(chosen.get("sample_prompts", ""))
        if chosen.get("initial_embedding") == CLASS_WORD:
            chosen["initial_embedding"] = ""
        names = [field.name for field in dataclasses.fields(TrainOptions) if field.name in chosen]
        options = TrainOptions(**{name: chosen.pop(name) for name in names})
        return io.NodeOutput(TrainingSettings(**chosen, class_images=tuple(class_images or ()), options=options))
