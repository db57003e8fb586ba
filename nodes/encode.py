"""EncodeImagePrompt: encode pictures as an image prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..core.image_prompt import ImagePrompt, ReferenceImage
from .host.conditioning import reference_texts
from .host.images import SIZE_MULTIPLE, encode_picture, fit_picture, split_images
from .host.masks import check_leaves_something, split_masks
from .sockets import CATEGORY, IMAGE_PROMPT

NAME = "Encode Image Prompt"


class EncodeImagePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EncodeImagePrompt",
            display_name=NAME,
            category=CATEGORY,
            description="Encodes pictures of a subject as an image prompt for Apply Self-Attention Injection.",
            is_input_list=True,  # so that pictures of different sizes can come as a list
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Pictures of the subject: one, a batch, or a list of different sizes. 1 to 4 are "
                    "useful. More pictures make sampling slower; together they count as much as one.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the base model."),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=SIZE_MULTIPLE,
                    max=2048,
                    step=SIZE_MULTIPLE,
                    tooltip="Width and height in pixels to which each picture is scaled. Best: the resolution "
                    "that the adapter was trained at (512 for SD1.x, 768 for SD2.x, 1024 for SDXL). 512 for "
                    "the other families. "
                    "Lower: faster, less detail. Higher: slower, and the subject tends to become "
                    "larger.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["crop", "pad", "stretch"],
                    default="crop",
                    tooltip="How a picture becomes square. crop: scale to fill and cut off the edges. pad: show "
                    "the whole picture; the added border is masked out. stretch: change the "
                    "proportions.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is, one mask for each picture, in its size. Black parts "
                    "are dropped: the background has no effect, and sampling is faster. The mask of "
                    "LoadImage is inverted: put InvertMask between. The mask of Load SA-Inject Dataset "
                    "is right as it is. Not connected: the whole picture is used.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Text for the reference pass: one for all pictures, or a list with one for each. "
                    "Only the text is used. Not connected: the class word that the adapter was trained with.",
                ),
                IMAGE_PROMPT.Input(
                    "image_prompt",
                    optional=True,
                    tooltip="An earlier image prompt of the same subject. These pictures are added to it.",
                ),
            ],
            outputs=[
                IMAGE_PROMPT.Output(
                    display_name="image_prompt", tooltip="The image prompt, for Apply Self-Attention Injection."
                )
            ],
        )

    @classmethod
    def execute(cls, images, vae, resolution, fit, mask=None, conditioning=None, image_prompt=None) -> io.NodeOutput:
        pictures = split_images(images, NAME)
        masks = split_masks(mask, pictures, NAME)
        texts = reference_texts(conditioning or [], len(pictures), NAME)
        encoded = []
        for number, (picture, subject, text) in enumerate(zip(pictures, masks, texts, strict=True), start=1):
            picture, subject = fit_picture(picture, subject, resolution[0], fit[0])
            check_leaves_something(subject, number, NAME, size=tuple(picture.shape[-2:]))
            encoded.append(ReferenceImage(encode_picture(vae[0], picture), subject, text))
        prompt = ImagePrompt(tuple(encoded))
        for earlier in reversed(image_prompt or []):
            prompt = earlier + prompt
        return io.NodeOutput(prompt)
