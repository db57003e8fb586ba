"""SaveSAInjectAdapter: save an adapter of the graph as a file."""

from __future__ import annotations

from comfy_api.latest import io

from .host.provenance import Provenance
from .host.saving import check_can_save, existing_files, save_new_adapter, wanted_path
from .sockets import CATEGORY, SA_INJECT_ADAPTER
from .version import VERSION


class SaveSAInjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveSAInjectAdapter",
            display_name="Save SA-Inject Adapter",
            category=CATEGORY,
            description="Saves an adapter to models/sa_inject. Train saves its own file. This node is for "
            "another name, another folder, or a file that could not be written.",
            is_output_node=True,
            inputs=[
                SA_INJECT_ADAPTER.Input(
                    "adapter", tooltip="The adapter to save, from Train SA-Inject Adapter or Load SA-Inject Adapter."
                ),
                io.String.Input(
                    "file_name",
                    default="sainj",
                    tooltip="Name of the file in models/sa_inject. Use / for a sub-folder, which may be a link "
                    "to another disk. A file that holds another adapter is not overwritten: a number is "
                    "added to the name. A file that holds this adapter is kept.",
                ),
            ],
            outputs=[
                SA_INJECT_ADAPTER.Output(display_name="adapter", tooltip="The same adapter, with the name of its file.")
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, file_name=None) -> bool | str:
        """Check name and folder before the graph runs: earlier nodes may take hours."""
        if file_name is None:  # it comes from another node and is not known yet
            return True
        try:
            check_can_save(wanted_path(file_name))
        except (ValueError, OSError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file_name=None, **kwargs) -> str:
        """Changes if the file was deleted or changed, so that it is saved again."""
        return "" if file_name is None else str(existing_files(file_name))

    @classmethod
    def execute(cls, adapter, file_name) -> io.NodeOutput:
        path = wanted_path(file_name)
        check_can_save(path, adapter.info.layers, adapter.info.rank)
        saved = save_new_adapter(adapter, path, Provenance(cls.hidden.prompt, cls.hidden.extra_pnginfo, VERSION))
        return io.NodeOutput(saved.adapter)
