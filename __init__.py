"""SA-Inject: teach a frozen text-to-image model a new subject by self-attention injection."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Hand ComfyUI the nodes; nothing is imported before it asks."""
    from .nodes.extension import SAInjectExtension

    return SAInjectExtension()
