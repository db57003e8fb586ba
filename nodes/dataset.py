"""LoadSAInjectDataset: read a folder as images, captions and masks."""

from __future__ import annotations

from comfy_api.latest import io

from .host.dataset import read_dataset
from .host.dataset_files import dataset_fingerprint, dataset_folder, dataset_folders
from .host.progress import show_on_node
from .sockets import CATEGORY


class LoadSAInjectDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSAInjectDataset",
            display_name="Load SA-Inject Dataset",
            category=CATEGORY,
            description="Reads the pictures of a folder, with their captions and masks, for Train SA-Inject Adapter.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=dataset_folders(),
                    tooltip="A folder inside ComfyUI/input with 3 to 10 pictures of one subject. Press R in the "
                    "browser after adding a folder. The caption of name.jpg is name.txt. Its mask is "
                    "name-masklabel.png or name_mask.png.",
                ),
                io.String.Input(
                    "placeholder_token",
                    default="sainj",
                    tooltip="The word that replaces [trigger] in captions. Use the same word as in Train "
                    "SA-Inject Adapter. Captions without [trigger] are not changed. Empty: [trigger] is "
                    "not replaced.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="Every picture, upright, in sRGB, sorted by file name: 2 comes before 10.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="One text for each picture. It is empty for a picture without a caption; Train then uses "
                    "neutral captions.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="One mask for each picture, white where the subject is. It is all white for a picture "
                    "without mask and transparency.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder=None) -> bool | str:
        """Replaces the host's check, which rejects new folders as 'not in list'."""
        if folder is None:  # connected to another node
            return True
        try:
            dataset_folder(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder=None, **kwargs) -> str:
        return "" if folder is None else dataset_fingerprint(folder)

    @classmethod
    def execute(cls, folder, placeholder_token="sainj") -> io.NodeOutput:
        dataset = read_dataset(folder, placeholder_token.strip())
        show_on_node(dataset.summary(), cls.hidden.unique_id)
        return io.NodeOutput(dataset.images, dataset.captions, dataset.masks)
