"""ApplySelfAttnInjection: a model that attends to an image prompt while it samples."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainer.config import REFERENCE_START
from .host.drawing.injection import APPLY_TO, BLOCK_CHOICES, DEFAULT_STRENGTH, build_injection
from .host.drawing.patch import patch_self_attention
from .sockets import CATEGORY, IMAGE_PROMPT, SA_INJECT_ADAPTER


class ApplySelfAttnInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ApplySelfAttnInjection",
            display_name="Apply Self-Attention Injection",
            category=CATEGORY,
            description="Lets the model look at an image prompt through a trained adapter. Chain it for two subjects.",
            inputs=[
                io.Model.Input("model", tooltip="The base model that the adapter was trained on, or a relative of it."),
                SA_INJECT_ADAPTER.Input("adapter", tooltip="From Load or Train SA-Inject Adapter."),
                IMAGE_PROMPT.Input("image_prompt", tooltip="Pictures of the subject, from Encode Image Prompt."),
                io.Float.Input(
                    "strength",
                    default=DEFAULT_STRENGTH,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of what the reference says is added, as a factor. 0 switches it off, exactly; 1 "
                    "is what the adapter was trained with, but CFG amplifies it: in the benchmark 0.7 was 0.007 better "
                    "than 1, and 1.4 0.03 worse. 0.4 to 1 is useful; far above, colours and shapes burn.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=REFERENCE_START,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When injection begins, as a share of the sampling schedule. 0.3 is what the adapter was "
                    "trained with and leaves the layout to the text; 0 is the first step, and the layout of the "
                    "pictures comes through; 0.6 adds only detail. From end_percent on nothing is injected. With 1 to "
                    "4 steps (Turbo, LCM, Lightning) take 0 to 0.25: no step may lie after 0.3.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When injection ends. 1 is the last step; earlier leaves fine detail to the base model.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=list(APPLY_TO),
                    default="positive",
                    tooltip="Which prompts see the reference. positive: only the positive one, so that CFG strengthens "
                    "the subject. both: the negative one too, which is softer and slower.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=list(BLOCK_CHOICES),
                    default="all",
                    tooltip="Which part of the UNet looks at the reference. all: as trained. encoder: mostly layout "
                    "and shape. decoder: mostly colour and detail. middle: the coarsest layer alone, a faint hint. "
                    "In the benchmark middle and decoder lost nothing, the encoder alone 0.05 of 0.84.",
                ),
                io.Mask.Input(
                    "attn_mask",
                    optional=True,
                    tooltip="Where in the new picture the reference may act: white yes, black not at all, grey in "
                    "part. Any size; it is stretched over what is drawn. With chained nodes, one mask for each "
                    "subject. Leave it open where a picture is drawn in pieces (tiles, faces): each piece is a run of "
                    "its own, and would get the whole mask.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, adapter, image_prompt, strength, start_percent, end_percent, apply_to, blocks, attn_mask=None
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
        return io.NodeOutput(model if injection is None else patch_self_attention(model, injection))
