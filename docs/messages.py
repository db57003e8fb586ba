"""The messages of the errors that the pack raises, read from the source. `docs/troubleshooting.md` lists them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
TABLE = re.compile(r"(?<=<!-- messages -->\n).*?(?=<!-- end -->)", re.DOTALL)
FOLDERS = ("core", "trainer", "nodes")
GAP = "…"  # in the place of a value that is known only when the message is raised
SHORTEST = 20  # letters; shorter texts are parts of a message that is put together elsewhere
INTERNAL = {"AttributeError", "NotImplementedError", "AssertionError", "KeyError", "UnusableMetadata"}
BESIDE_A_NAME = {"UnreadablePicture"}  # shown behind the name of a file, so they begin in lower case

Named = dict[str, ast.AST]  # functions, and constants of the module


def messages() -> list[str]:
    """Every message that is raised, once, in alphabetical order."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    found = {message for path in paths for message in raised_in(path.read_text(encoding="utf-8"))}
    return sorted(found, key=lambda message: message.lstrip(f"'{GAP} :").lower())


def raised_in(source: str) -> Iterator[str]:
    module = ast.parse(source)
    functions = {node.name: node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}
    constants = {ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)}
    named = {**constants, **functions}
    for scope in [module, *functions.values()]:
        for node in _own_nodes(scope):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                error = ast.unparse(node.exc.func)
                texts = [] if error in INTERNAL else _texts(node.exc.args[0], scope, named)
                yield from (text for text in texts if error in BESIDE_A_NAME or _is_whole(text))


def with_table(page: str) -> str:
    """The page with its list of messages written anew."""
    return TABLE.sub(lambda _: f"\n{table(messages())}\n\n", page)


def table(found: list[str]) -> str:
    """A row for each message: what is wrong, and what to do."""
    rows = ["| message | what to do |", "| --- | --- |"]
    for message in found:
        what, cure = (*re.split(rf"\.{GAP}?\s", _cell(message), maxsplit=1), "")[:2]
        rows.append(f"| {what.removesuffix('.')} | {cure} |")
    return "\n".join(rows)


def _is_whole(text: str) -> bool:
    """Whether it is a message and no part of one: long enough, and beginning with a capital or an input's name."""
    first = text.lstrip(f"'{GAP}: ").partition(" ")[0]
    return sum(letter.isalpha() for letter in text) >= SHORTEST and not (text[0].islower() and "_" not in first)


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope without those of functions inside it."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own_nodes(child)


def _texts(node: ast.AST, scope: ast.AST, named: Named, depth: int = 4) -> list[str]:
    """The texts that an expression may have, with a gap for what the source does not say."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [_one_gap("".join(_part(part, named) for part in node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        ends = _texts(node.right, scope, named, depth)
        return [_one_gap(start + end) for start in _texts(node.left, scope, named, depth) for end in ends]
    if isinstance(node, ast.IfExp):
        return [text for branch in (node.body, node.orelse) for text in _texts(branch, scope, named, depth)]
    if depth and isinstance(node, ast.Name):
        given = [
            one.value
            for one in _own_nodes(scope)
            if isinstance(one, ast.Assign) and [ast.unparse(target) for target in one.targets] == [node.id]
        ]
        return [text for value in given for text in _texts(value, scope, named, depth - 1)] or [GAP]
    if depth and isinstance(node, ast.Call) and isinstance(named.get(ast.unparse(node.func)), ast.FunctionDef):
        called = named[ast.unparse(node.func)]
        returned = [one.value for one in _own_nodes(called) if isinstance(one, ast.Return) and one.value]
        return [text for value in returned for text in _texts(value, called, named, depth - 1)] or [GAP]
    return [GAP]


def _part(part: ast.AST, named: Named) -> str:
    """A piece of an f-string."""
    value = named.get(ast.unparse(part.value)) if isinstance(part, ast.FormattedValue) else part
    return str(value.value) if isinstance(value, ast.Constant) else GAP


def _one_gap(text: str) -> str:
    return re.sub(rf"{GAP}(\s*{GAP})+", GAP, text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
