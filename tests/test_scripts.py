"""The scripts in `web/` fit the frontend's published types, import only what lasts, and never parse markup."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "tests" / "web"
SCRIPTS = sorted((ROOT / "web").rglob("*.*js"))
IMPORT = re.compile(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""")
MARKUP = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """TypeScript and the frontend's types, fetched once."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    modules = PROJECT / "node_modules"
    if not (modules / "typescript").exists():
        command = ["npm", "install", "--no-save", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip("npm could not fetch TypeScript and the frontend's types")
    return modules


def test_scripts_fit_the_types_of_the_frontend(tools):
    compiler = tools / "typescript" / "bin" / "tsc"
    done = subprocess.run(["node", str(compiler), "-p", str(PROJECT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_the_check_finds_a_wrong_call(tools, tmp_path):
    wrong = '// @ts-check\nimport { app } from "../../scripts/app.js";\napp.registerExtension({ name: 5 });\n'
    script = ROOT / "web" / "wrong_for_a_test.js"
    script.write_text(wrong)
    try:
        compiler = tools / "typescript" / "bin" / "tsc"
        done = subprocess.run(["node", str(compiler), "-p", str(PROJECT)], capture_output=True, text=True, timeout=300)
    finally:
        script.unlink()
    assert "wrong_for_a_test" in done.stdout and done.returncode != 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_checked_small_and_safe(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("// @ts-check\n/**"), "says that it is checked, and what it is for"
    assert len(text.splitlines()) < 300
    assert not MARKUP.search(text)
    for imported in IMPORT.findall(text):
        assert imported.endswith((".mjs", "scripts/app.js", "scripts/api.js")), imported
        if imported.endswith(".mjs"):
            assert (path.parent / imported).resolve().is_file()


def test_the_host_loads_extensions_only():
    """It imports every `.js` below `web/` when the page opens."""
    for path in (ROOT / "web").rglob("*.js"):
        assert "app.registerExtension(" in path.read_text(encoding="utf-8"), path
