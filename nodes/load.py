"""LoadSAInjectAdapter: load an adapter file, and add its placeholder token to a CLIP."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from .host.adapter_index import adapter_fingerprint
from .host.embeddings import save_embedding, times_deleted
from .host.files import adapter_names, read_adapter
from .host.progress import show_on_node
from .host.text import check_placeholder_token, clip_with_token, warn_of_taken_word
from .sockets import CATEGORY, SA_INJECT_ADAPTER


class LoadSAInjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSAInjectAdapter",
            display_name="Load SA-Inject Adapter",
            category=CATEGORY,
            description="Loads a trained subject: its adapter, and a CLIP that understands its placeholder token.",
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=adapter_names(),
                    tooltip="A file in models/sa_inject. Press R in the browser after adding files.",
                ),
                io.Boolean.Input(
                    "write_embedding",
                    default=False,
                    tooltip="Also save the token embedding to models/embeddings, under the adapter's name with "
                    "its sub-folder. Then embedding:toys/robot works in any prompt, without this node. "
                    "A file that SA-Inject did not write is never replaced.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP of the base model. It is not changed: the CLIP that comes out is a copy. "
                    "Not connected: no CLIP comes out.",
                ),
                io.String.Input(
                    "placeholder_token",
                    default="",
                    optional=True,
                    tooltip="Another word for the subject. Use it when two adapters were trained with the same "
                    "word. It must be a made-up word. Empty: the word that the adapter was trained "
                    "with.",
                ),
            ],
            outputs=[
                SA_INJECT_ADAPTER.Output(
                    display_name="adapter", tooltip="The adapter, for Apply Self-Attention Injection."
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The CLIP with the placeholder token, for any CLIP Text Encode. Prompt "
                    "weights such as (sainj:1.2) and clip skip work.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name=None, write_embedding=False, **kwargs) -> str:
        """Inputs that come from other nodes are None or missing."""
        deleted = 0 if write_embedding is False or adapter_name is None else times_deleted(adapter_name)
        return f"{adapter_fingerprint(adapter_name)} {deleted}"

    @classmethod
    def execute(
        cls, adapter_name, write_embedding=False, clip: io.Clip.Type | None = None, placeholder_token=""
    ) -> io.NodeOutput:
        adapter = read_adapter(adapter_name)
        if word := placeholder_token.strip():
            check_placeholder_token(clip, word)
            adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, placeholder_token=word))
        if write_embedding:
            save_embedding(adapter, adapter_name)
        if clip is None:
            return io.NodeOutput(adapter, None)
        warning = warn_of_taken_word(clip, adapter.info.placeholder_token, adapter.token_embedding)
        if warning is not None:
            show_on_node(warning, cls.hidden.unique_id)
        return io.NodeOutput(adapter, clip_with_token(clip, adapter.info.placeholder_token, adapter.token_embedding))
