"""The entry point of the pack for ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import NODES
from .host.adapter_routes import register_adapter_routes
from .host.files import register_folder
from .host.networks.checkpoint_kind import architecture_of
from .host.run_routes import register_run_routes


class SAInjectExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()  # here, not in on_load, which ComfyUI 0.3.75 never calls
        register_adapter_routes(architecture_of)
        register_run_routes()
        return NODES
