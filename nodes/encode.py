"""EncodeImagePrompt: pictures become an image prompt."""

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
            description="Turns pictures of a subject into an image prompt for Apply Self-Attention Injection.",
            is_input_list=True,  # so that a list of pictures of different sizes makes one prompt
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="Pictures of the subject: one, a batch, or a list of different sizes. 1 to 4 are usual; "
                    "more pictures cost more time and share the weight of one.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the base model that will draw."),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=SIZE_MULTIPLE,
                    max=2048,
                    step=SIZE_MULTIPLE,
                    tooltip="Side in pixels at which the pictures are read. Best is the resolution that the adapter "
                    "was trained at (512 for SD1.x, 1024 for SDXL). Smaller is faster and loses detail; larger is "
                    "slower, and the subject tends to come out larger.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["crop", "pad", "stretch"],
                    default="crop",
                    tooltip="How a picture becomes a square. crop: fill it and cut the edges off. pad: show the whole "
                    "picture, the added border is masked out. stretch: change the proportions.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is, one mask for each picture, of its size. Black parts are not "
                    "handed over at all: their background cannot leak in, and sampling gets faster. LoadImage's mask "
                    "is the other way round: put InvertMask between. Load SA-Inject Dataset's is right as it is.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Text that the model reads beside these pictures: one for all of them, or a list with one "
                    "for each. Only its text counts. Left open, the class word that the adapter was trained with.",
                ),
                IMAGE_PROMPT.Input(
                    "image_prompt",
                    optional=True,
                    tooltip="An earlier image prompt of the same subject; these pictures are added to it.",
                ),
            ],
            outputs=[IMAGE_PROMPT.Output(display_name="image_prompt")],
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
