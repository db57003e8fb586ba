"""LoadSAInjectAdapter: a file becomes an adapter, and a CLIP that knows its word."""

from __future__ import annotations

import hashlib

from comfy_api.latest import io

from .host.files import adapter_names, adapter_path, read_adapter, save_embedding
from .host.text import clip_with_token
from .sockets import CATEGORY, SA_INJECT_ADAPTER


class LoadSAInjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSAInjectAdapter",
            display_name="Load SA-Inject Adapter",
            category=CATEGORY,
            description="Loads a trained subject: its adapter, and a CLIP that understands its word.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=adapter_names(),
                    tooltip="A file in the folder models/sa_inject. Press R in the browser after adding files.",
                ),
                io.Boolean.Input(
                    "write_embedding",
                    default=False,
                    tooltip="Also writes the learned word to models/embeddings under the adapter's name, so that "
                    "'embedding:name' works in any prompt, without this node too. An older file of that name is "
                    "replaced.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the base model. The one that comes out reads the adapter's placeholder word "
                    "in any CLIP Text Encode; the one that goes in stays as it is.",
                ),
            ],
            outputs=[
                SA_INJECT_ADAPTER.Output(display_name="adapter"),
                io.Clip.Output(display_name="clip"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name, **kwargs) -> str:
        try:
            content = adapter_path(adapter_name).read_bytes()
        except FileNotFoundError:
            return "missing"
        # A file's time is too coarse: two saves in quick succession may share it.
        return hashlib.sha256(content).hexdigest()

    @classmethod
    def execute(cls, adapter_name, write_embedding=False, clip=None) -> io.NodeOutput:
        adapter = read_adapter(adapter_name)
        if write_embedding:
            save_embedding(adapter)
        taught = None if clip is None else clip_with_token(clip, adapter.info.placeholder, adapter.tokens)
        return io.NodeOutput(adapter, taught)
