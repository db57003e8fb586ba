"""Imports point up the table of the style guide, and nothing heavy is imported before it is used."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TENSORS = {"torch", "safetensors", "peft", "einops"}
HOST = {"aiohttp", "comfy", "comfy_api", "comfy_execution", "folder_paths", "node_helpers", "server"}
CONFIGURATION = {"yaml"}  # the host's own list of model folders
PICTURES = {"numpy", "PIL"}  # the host's own currency for previews and files

ANY_HOST = TENSORS | PICTURES | CONFIGURATION | HOST
# Drawing and learning do not import each other.
HOST_FOLDERS = {"nodes/host", "nodes/host/networks", "nodes/host/drawing", "nodes/host/learning"}
HOST_TYPES = "nodes/host/host_types"  # a file that is a layer of its own: all of nodes/host may name these types

# folder: (layers of the pack it may import, third-party modules it may import); the standard library is free
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "core": ({"core"}, TENSORS),
    "trainer": ({"core", "trainer"}, TENSORS | {"prodigyopt"}),
    HOST_TYPES: (set(), HOST),
    "nodes/host": ({"core", "trainer", "nodes/host", HOST_TYPES}, ANY_HOST),
    "nodes/host/networks": ({"core", "nodes/host/networks", HOST_TYPES}, ANY_HOST),
    "nodes/host/drawing": (
        {"core", "trainer", "nodes/host", HOST_TYPES, "nodes/host/networks", "nodes/host/drawing"},
        ANY_HOST,
    ),
    "nodes/host/learning": (
        {"core", "trainer", "nodes/host", HOST_TYPES, "nodes/host/networks", "nodes/host/learning"},
        ANY_HOST,
    ),
    "nodes": ({"core", "trainer", "nodes", *HOST_FOLDERS}, TENSORS | {"comfy_api"}),
}
FILES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FILES = list(dict.fromkeys(FILES))


def layer_of(path: str) -> str | None:
    """`nodes/host/drawing/patch.py` -> `nodes/host`; the longest name wins."""
    path = path.removesuffix(".py")
    inside = [layer for layer in LAYERS if path == layer or path.startswith(layer + "/")]
    return max(inside, key=len, default=None)


def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def imports_at_import_time(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """What runs when the file is imported: everything outside functions and `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""]


def pack_targets(path: str, node: ast.ImportFrom) -> list[str]:
    """The files or folders of the pack that a relative import reaches, as paths from the root."""
    base = Path(path).parts[: -node.level]
    base = (*base, *(node.module or "").split(".")) if node.module else base
    if (ROOT.joinpath(*base)).with_suffix(".py").is_file():
        return ["/".join(base)]
    return ["/".join((*base, alias.name)) for alias in node.names]


def complaints(path: str) -> Iterator[str]:
    layer = layer_of(path)
    assert layer is not None
    ours, theirs = LAYERS[layer]
    for node in imports(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            for target in pack_targets(path, node):
                if node.level > len(Path(path).parts):
                    yield f"{path}:{node.lineno} leaves the pack"
                elif layer_of(target) not in ours:
                    yield f"{path}:{node.lineno} {layer} may not import {target}"
            continue
        for module in modules(node):
            top = module.split(".")[0]
            if top not in theirs and top not in sys.stdlib_module_names:
                yield f"{path}:{node.lineno} {layer} may not import {module}"


@pytest.mark.parametrize("path", FILES)
def test_imports_point_up_the_table(path):
    assert list(complaints(path)) == []


@pytest.mark.parametrize("path", FILES)
def test_peft_is_imported_inside_functions_only(path):
    early = [node.lineno for node in imports_at_import_time(tree_of(path)) if "peft" in str(modules(node))]
    assert early == [], f"{path} imports peft when it is imported: that costs every user seconds at start"


@pytest.mark.parametrize("path", FILES)
def test_optional_packages_are_imported_inside_functions_only(path):
    early = [node.lineno for node in imports_at_import_time(tree_of(path)) if "prodigyopt" in str(modules(node))]
    assert early == [], f"{path} cannot be imported without prodigyopt, which is optional"


@pytest.mark.parametrize("path", FILES)
def test_nothing_prints(path):
    calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


def test_the_root_imports_nothing_at_import_time():
    early = [node for node in imports_at_import_time(tree_of("__init__.py")) if modules(node) != ["__future__"]]
    assert [f"line {node.lineno}: {ast.unparse(node)}" for node in early] == []


def test_the_table_catches_what_it_should(monkeypatch):
    cases = {
        ("core/kv.py", "import comfy.utils"): 1,
        ("core/kv.py", "from ..trainer import loop"): 1,
        ("core/kv.py", "from sa_inject.core import kv"): 1,
        ("core/kv.py", "from .injection import inject\nimport math, torch"): 0,
        ("trainer/loop.py", "from ..core.kv import KV"): 0,
        ("trainer/loop.py", "from .. import nodes"): 1,
        ("nodes/host/drawing/patch.py", "import folder_paths\nfrom ....trainer.loop import train"): 0,
        ("nodes/host/drawing/patch.py", "from ...train import TrainNode"): 1,
        ("nodes/host/drawing/patch.py", "from ..learning.training import AdapterTraining"): 1,
        ("nodes/host/learning/training.py", "from ..drawing.patch import patch_model"): 1,
        ("nodes/host/networks/unet.py", "from ..text import clip_with_token"): 1,
        ("nodes/host/networks/unet.py", "from ..host_types import ModelSampling"): 0,
        ("nodes/host/host_types.py", "from .text import clip_with_token"): 1,
        ("nodes/host/learning/training.py", "from ..networks.unet import describe\nfrom ..text import folded"): 0,
        ("nodes/train.py", "from .host.drawing import patch\nfrom comfy_api.latest import io"): 0,
        ("nodes/train.py", "def f():\n    import comfy.samplers"): 1,
    }
    for (path, source), expected in cases.items():
        monkeypatch.setitem(globals(), "tree_of", lambda _, source=source: ast.parse(source))
        assert len(list(complaints(path))) == expected, (path, source, list(complaints(path)))
