"""SAInjectTrainingSettings: what a training may be told beyond the inputs of its own node."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainer.settings import NEVER, TrainingSettings, prompt_lines
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
            ],
            outputs=[
                SA_INJECT_TRAINING_SETTINGS.Output(
                    display_name="settings", tooltip="For settings of Train SA-Inject Adapter."
                )
            ],
        )

    @classmethod
    def execute(cls, sample_prompts="", **inputs) -> io.NodeOutput:
        return io.NodeOutput(TrainingSettings(sample_prompts=prompt_lines(sample_prompts), **inputs))
