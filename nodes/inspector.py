"""InspectSelfAttnInjection: heat maps of what a reference adds while sampling, and of its attention."""

from __future__ import annotations

from comfy_api.latest import io

from .host.drawing.inspection import inspect_sampling
from .host.drawing.inspection_sheets import added_sheet, attention_sheet
from .host.samplers import SAMPLERS, SCHEDULERS
from .sockets import CATEGORY


class InspectSelfAttnInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InspectSelfAttnInjection",
            display_name="Inspect Self-Attention Injection",
            category=CATEGORY,
            description="Samples once and shows where the reference acts. Use it when an adapter does not do what it "
            "should.",
            is_output_node=False,
            inputs=[
                io.Model.Input("model", tooltip="The model from Apply Self-Attention Injection. Chained nodes add up."),
                io.Conditioning.Input("positive", tooltip="The prompt that names the subject."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, as for the sampler."),
                io.Latent.Input("latent_image", tooltip="The latent to sample from, such as Empty Latent Image."),
                io.Vae.Input("vae", tooltip="The VAE of the base model. It decodes the picture below the colours."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Random seed. Use that of the picture which you want to understand.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=200,
                    tooltip="Sampling steps. 10 to 30 is useful. Few: faster, and fewer noise levels to look at.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance, as in the sampler. 3 to 8 is useful. 1: off.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default="euler_ancestral",
                    tooltip="The sampler. Use the one that you draw with.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="normal",
                    tooltip="The noise schedule. Use the one that you draw with.",
                ),
                io.Int.Input(
                    "noise_levels",
                    default=3,
                    min=1,
                    max=8,
                    tooltip="Number of steps to show, spread over those in which the reference acts. 3 is a good "
                    "choice. More: a wider sheet.",
                ),
                io.Float.Input(
                    "point_x",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The place whose source is shown, across the picture. 0: left. 1: right.",
                ),
                io.Float.Input(
                    "point_y",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The place whose source is shown, down the picture. 0: top. 1: bottom.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="added",
                    tooltip="How much the reference adds at each place: a row for each part of the UNet, a column for "
                    "each noise level.",
                ),
                io.Image.Output(
                    display_name="looked_at", tooltip="The chosen place, and where in the references it looks."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        latent_image: io.Latent.Type,
        vae: io.Vae.Type,
        noise_levels,
        point_x,
        point_y,
        **sampling,
    ) -> io.NodeOutput:
        point = (point_x, point_y)
        found = inspect_sampling(model, positive, negative, latent_image, point, **sampling)
        return io.NodeOutput(added_sheet(found, vae, noise_levels), attention_sheet(found, vae, point))
