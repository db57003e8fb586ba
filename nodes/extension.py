"""The pack as ComfyUI sees it."""

from comfy_api.latest import ComfyExtension, io

from . import NODES
from .host.files import register_folder


class SAInjectExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_folder()  # here, not in on_load, which ComfyUI 0.3.75 never calls
        return NODES
