"""The host inside the test's own process, on a temporary base directory. Nodes run as the executor runs them."""

import asyncio
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.host.tiny_checkpoints import tiny_checkpoint

ENCODERS = ("clip_l", "clip_g", "clip_h")


class Outputs(tuple):
    """The results of a node, and what it showed below itself."""

    ui: dict[str, Any]


class ComfyHost:
    """Imported once for the session. `base` holds models/, input/, output/, temp/, user/ and custom_nodes/."""

    def __init__(self, comfyui: Path, base: Path, cache: Path):
        self.base, self.cache = base, cache
        for name in ("models/checkpoints", "models/embeddings", "models/loras", "input", "output", "temp", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(comfyui))
        from comfy.cli_args import args  # its parser stays off: only main.py turns it on

        args.cpu = not torch.cuda.is_available()
        args.base_directory = str(base)
        args.database_url = "sqlite:///:memory:"

        importlib.import_module("utils.extra_config")  # before nodes.py puts comfy/, with its utils.py, on the path
        import folder_paths
        import nodes
        import server

        assert folder_paths.base_path == os.path.abspath(base), "the host was imported without this folder"
        assert nodes.__file__ and Path(nodes.__file__).parent == comfyui, f"{nodes.__file__} hides the host's nodes.py"
        server.PromptServer(asyncio.new_event_loop())  # nodes ask for its instance; it never listens
        self._nodes: dict[str, type] = nodes.NODE_CLASS_MAPPINGS
        self._has_extras = False

    def checkpoint(self, kind: str) -> Path:
        return tiny_checkpoint(kind, self.cache)

    def load_checkpoint(self, kind: str, text_layers: int | None = 3, **options) -> tuple[Any, Any, Any]:
        """(model, clip, vae) of a tiny checkpoint, made of inference tensors as the stock loader makes them.

        text_layers: how many layers of each text encoder to keep (3 at least), None for all of them.
        options: go to `comfy.sd.load_state_dict_guess_config`, as in model_options={"dtype": torch.bfloat16}.
        """
        import comfy.sd
        import comfy.utils
        import folder_paths

        few_layers = {f"{name}_model_config": {"num_hidden_layers": text_layers} for name in ENCODERS}
        with torch.inference_mode():
            model, clip, vae, *_ = comfy.sd.load_state_dict_guess_config(
                comfy.utils.load_torch_file(str(self.checkpoint(kind)), safe_load=True),
                embedding_directory=folder_paths.get_folder_paths("embeddings"),
                te_model_options=few_layers if text_layers else {},
                **options,
            )
            for name, weight in clip.cond_stage_model.named_parameters():
                if name == "clip_l.transformer.text_projection.weight":  # not in the checkpoint: undefined memory
                    weight.copy_(torch.eye(*weight.shape))
        return model, clip, vae

    def node(self, node_id: str) -> type:
        """A stock node, one of `probe_nodes`, or, after `pack_nodes`, one of ours."""
        if node_id not in self._nodes and not self._has_extras:
            import nodes

            from tests.host import probe_nodes

            self._has_extras = True
            asyncio.run(nodes.init_builtin_extra_nodes())
            self._nodes.update(probe_nodes.NODE_CLASS_MAPPINGS)
        return self._nodes[node_id]

    def pack_nodes(self) -> dict[str, type]:
        """Our nodes by their id, through the entry point that the host calls."""
        import sa_inject

        async def node_list() -> list[Any]:
            entrypoint = sa_inject.comfy_entrypoint()
            extension = await entrypoint if asyncio.iscoroutine(entrypoint) else entrypoint
            return await extension.get_node_list()

        found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(node_list())}
        self._nodes.update(found)
        return found

    def execute(self, node: str | type, unique_id: str = "1", **inputs) -> Outputs:
        """Run one node under inference mode.

        Widgets that are not given have their defaults. A node that takes lists gets each other input as a list of one.
        """
        cls: Any = self.node(node) if isinstance(node, str) else node
        inputs = {**defaults(cls.INPUT_TYPES()), **inputs}
        if getattr(cls, "INPUT_IS_LIST", False):
            inputs = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        with torch.inference_mode():
            if hasattr(cls, "PREPARE_CLASS_CLONE"):
                return outputs_v3(cls, inputs, unique_id)
            result = getattr(cls(), cls.FUNCTION)(**inputs)
            result = asyncio.run(result) if asyncio.iscoroutine(result) else result
        outputs = Outputs(result.get("result", ()) if isinstance(result, dict) else result or ())
        outputs.ui = result.get("ui", {}) if isinstance(result, dict) else {}
        return outputs


def outputs_v3(cls: Any, inputs: dict[str, Any], unique_id: str) -> Outputs:
    from comfy_api.internal import make_locked_method_func
    from comfy_api.latest import io
    from comfy_execution.utils import CurrentNodeContext

    hidden: dict[str, Any] = {io.Hidden.unique_id: unique_id, io.Hidden.prompt: {}, io.Hidden.extra_pnginfo: {}}
    hidden["hidden_inputs"] = dict(hidden)  # where hosts newer than 0.3.75 look for them
    cls.VALIDATE_CLASS()
    run = make_locked_method_func(cls, cls.FUNCTION, cls.PREPARE_CLASS_CLONE(hidden))
    with CurrentNodeContext("test", unique_id, 0):
        result = run(**inputs)
        result = asyncio.run(result) if asyncio.iscoroutine(result) else result
    outputs = Outputs(result.args)
    outputs.ui = result.ui if isinstance(result.ui, dict) else result.ui.as_dict() if result.ui else {}
    return outputs


def defaults(input_types: dict[str, dict[str, tuple]]) -> dict[str, Any]:
    """The values of a fresh node's widgets."""
    found = {}
    for name, (kind, *rest) in {**input_types.get("required", {}), **input_types.get("optional", {})}.items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if options.get("forceInput"):
            continue
        if "default" in options:
            found[name] = options["default"]
        elif choices:
            found[name] = choices[0]
    return found
