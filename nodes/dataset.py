"""LoadSAInjectDataset: a folder of pictures becomes images, captions and masks to train on."""

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
            description="Reads the pictures of a folder, with captions and masks that lie beside them, for Train "
            "SA-Inject Adapter.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=dataset_folders(),
                    tooltip="A folder inside ComfyUI/input with 3 to 10 pictures of one subject. Press R in the "
                    "browser after adding folders. name.txt beside name.jpg is its caption, name-masklabel.png or "
                    "name_mask.png its mask.",
                ),
                io.String.Input(
                    "placeholder_token",
                    default="sainj",
                    tooltip="Stands for [trigger] in captions: the same word as on Train SA-Inject Adapter. Captions "
                    "without [trigger] stay as they are. Left empty, [trigger] stays too.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="Every picture, upright, sorted by file name."
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="A text for each picture; empty where there is none, for which Train takes neutral ones.",
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="White where the subject is, as Train and Encode want it: connect it as it is. All white "
                    "for a picture without mask and transparency.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder=None) -> bool | str:
        """In the place of the host's own check, which calls every new folder 'not in list'."""
        if folder is None:  # it comes from another node
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
