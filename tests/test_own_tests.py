"""The tests themselves: names that are short claims, helpers with one home, and imports of what is there.

Many imports of the tests stand inside functions, where only running them on ComfyUI would find a module that moved.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("tests", "bench", "demo") for file in (ROOT / folder).rglob("*.py"))
LONGEST = 79  # letters of a test's name
OWN_HOME_FROM = 3  # statements of a helper


def trees(files: list[Path] = FILES) -> Iterator[tuple[str, ast.Module]]:
    for file in files:
        yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_names_of_tests_are_short():
    names = [(file, node.name) for file, tree in trees() for node in functions(tree) if node.name.startswith("test_")]
    assert len(names) > 500
    assert [name for name in names if len(name[1]) > LONGEST] == []


def test_no_two_tests_of_a_file_have_one_name():
    """The second would replace the first, which is never run then."""
    for file, tree in trees():
        names = [node.name for node in functions(tree)]
        assert (file, [name for name in set(names) if names.count(name) > 1]) == (file, [])


def test_helpers_have_one_home():
    homes: dict[str, list[str]] = {}
    for file, tree in trees():
        for node in functions(tree):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if file.startswith("tests/") and sum(isinstance(part, ast.stmt) for part in ast.walk(node)) > OWN_HOME_FROM:
                homes.setdefault("\n".join(map(ast.dump, body)), []).append(f"{file}: {node.name}")
    assert [found for found in homes.values() if len(found) > 1] == []


def test_what_is_imported_of_the_pack_is_there():
    missing = []
    for file, tree in trees():
        for node in ast.walk(tree):
            module = module_of(node, file) if isinstance(node, ast.ImportFrom) else None
            if isinstance(node, ast.ImportFrom) and module is not None:
                missing += [
                    f"{file}: {module.name}.{name.name}" for name in node.names if not is_there(module, name.name)
                ]
    assert missing == []


def module_of(node: ast.ImportFrom, file: str) -> Path | None:
    """The module as a path without its ending. None if it is not in this repository."""
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        return (ROOT / file).parents[node.level - 1].joinpath(*parts)
    if parts[0] == "sa_inject":
        return ROOT.joinpath(*parts[1:])
    return ROOT.joinpath(*parts) if parts[0] in ("bench", "demo", "tests") else None


def is_there(module: Path, name: str) -> bool:
    if module.with_suffix(".py").is_file():
        return name in names_in(module.with_suffix(".py"))
    inside = (module / f"{name}.py").is_file() or (module / name).is_dir()
    return module.is_dir() and (inside or name in names_in(module / "__init__.py"))


@functools.cache
def names_in(file: Path) -> set[str]:
    """What a module defines or imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(name.asname or name.name).partition(".")[0] for name in node.names}
    return found


def test_modules_that_tests_change_by_name_are_there():
    """As in monkeypatch.setattr("sa_inject.core.lora.name", ...)."""
    for file, tree in trees():
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if text.startswith("sa_inject.") and text.count(".") > 2 and text.replace(".", "").isidentifier():
                module, _, name = text.rpartition(".")
                path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
                if not path.is_file():  # a method: the class is what the module has
                    path, name = path.parent.with_suffix(".py"), path.stem
                assert path.is_file() and name in names_in(path), f"{file}: {text}"
