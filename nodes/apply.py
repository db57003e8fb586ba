"""ApplySelfAttnInjection: let a model attend to an image prompt while it samples."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.adapter import Adapter
from ..core.image_prompt import ImagePrompt
from ..core.schedule import DEFAULT_STRENGTH, REFERENCE_START
from .host.drawing.injection import APPLY_TO, BLOCK_CHOICES, build_injection
from .host.drawing.patched_model import patch_model
from .sockets import CATEGORY, IMAGE_PROMPT, SA_INJECT_ADAPTER


class ApplySelfAttnInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplySelfAttnInjection",
            display_name="Apply Self-Attention Injection",
            category=CATEGORY,
            description="Lets the model attend to an image prompt through a trained adapter. Chain two of "
            "these nodes for two subjects.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model: the checkpoint that the adapter was trained on, or a fine-tune of "
                    "it. It may carry LoRAs.",
                ),
                SA_INJECT_ADAPTER.Input(
                    "adapter", tooltip="The trained adapter, from Load SA-Inject Adapter or Train SA-Inject Adapter."
                ),
                IMAGE_PROMPT.Input("image_prompt", tooltip="Pictures of the subject, from Encode Image Prompt."),
                io.Float.Input(
                    "strength",
                    default=DEFAULT_STRENGTH,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Strength of the reference, as a factor. 0: off, exactly the base model's picture. "
                    "0.4 to 1: useful. 1: as trained, but CFG amplifies it. Low: less likeness. Far "
                    "above 1: colours and shapes break.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=REFERENCE_START,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where injection starts, as a fraction of the sampling schedule. 0.3: as trained; "
                    "the text decides the layout. 0: from the first step; the layout may "
                    "follow the reference too. 0.6: only details follow the reference. With 1 to 4 steps "
                    "(Turbo, LCM, Lightning) use 0 to 0.25.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where injection ends, as a fraction of the sampling schedule. 1: after the last "
                    "step. Lower: the base model alone draws the fine detail. At or below "
                    "start_percent: nothing is injected.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default="positive",
                    tooltip="Which prompt gets the reference. positive: usual; CFG amplifies the subject. both: "
                    "the negative prompt gets it too; the effect is weaker and sampling is slower.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=list(BLOCK_CHOICES),
                    default="all",
                    tooltip="Which self-attention layers of the UNet get the reference. all: as trained. decoder: "
                    "nearly the whole effect. encoder, or middle (the coarsest layers): a weak effect. middle "
                    "and decoder: both of them.",
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the new picture the reference acts. White: fully. Black: not at all. "
                    "Grey: in part. The mask is resized to the picture. For two subjects, give each "
                    "Apply node its own mask. Connect none for tiled upscalers and face detailers. "
                    "They sample each piece in its own run, and each run gets the whole mask.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model with injection, for a sampler. The model that came in is not changed.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        adapter: Adapter,
        image_prompt: ImagePrompt,
        strength,
        start_percent,
        end_percent,
        apply_to,
        blocks,
        attn_mask=None,
    ) -> io.NodeOutput:
        injection = build_injection(
            model,
            adapter,
            image_prompt,
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            apply_to=apply_to,
            blocks=blocks,
            attn_mask=attn_mask,
            node_id=cls.hidden.unique_id,
        )
        return io.NodeOutput(model if injection is None else patch_model(model, injection))
