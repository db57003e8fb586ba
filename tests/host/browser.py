"""The real frontend in Chromium: two releases of it, and both ways to draw nodes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()
NEWEST_FRONTEND = "1.58.1"  # the other one is that of ComfyUI 0.3.75
RENDERERS = ("classic", "vue")
# Before the socket is open and the server has named the page, what it tells is lost.
READY = (
    "window.app && window.app.graph && window.app.extensionManager"
    " && !!window.LiteGraph?.registered_node_types['TrainSAInjectAdapter']"
    " && app.api.socket?.readyState === WebSocket.OPEN && !!app.api.clientId"
)
TOLD_BY_US = ("sa-inject", "sa_inject", "SA-Inject", "SAInject")


def newest_frontend(cache: Path) -> Path | None:
    """The folder of a newer frontend for `--front-end-root`, downloaded once. None if there is no network."""
    folder = cache / f"frontend-{NEWEST_FRONTEND}"
    static = folder / "comfyui_frontend_package" / "static"
    if not (folder / "complete").exists():
        package = f"comfyui-frontend-package=={NEWEST_FRONTEND}"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), package]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        (folder / "complete").touch()
    return static


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser: Any, client: Any, renderer: str, locale: str = "en", **context: Any) -> Any:
    """A page with the frontend ready. `page.complaints` collects its console messages about us."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": renderer == "vue",
        "Comfy.Locale": locale,
        "Comfy.Workflow.WarnBlueprintOverwrite": False,
    }
    client.request("/api/settings", settings)
    options = {"viewport": {"width": 1600, "height": 1000}, **context}
    page = browser.new_context(**options).new_page()
    page.complaints = []
    page.on("console", lambda message: _note(page.complaints, message.type, message.text, message.location))
    page.on("pageerror", lambda error: _note(page.complaints, "error", f"{error} {error.stack or ''}", {}))
    page.goto(f"http://{client.address}")
    ready(page)
    assert page.evaluate("() => Boolean(LiteGraph.vueNodesMode)") == (renderer == "vue")
    return page


def ready(page: Any) -> None:
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(500)  # the first workflow is opened after that


def _note(complaints: list[str], kind: str, text: str, location: dict) -> None:
    where = location.get("url") or ""
    if kind in ("error", "warning") and any(name in text + where for name in TOLD_BY_US):
        if "api.comfy.org" not in text:  # the host asks there about every pack, and is not let out
            complaints.append(f"{kind}: {text} {where}")


def add_nodes(page: Any, *types: str) -> list[int]:
    """Open an empty graph with these nodes in a row, in view. -> their numbers"""
    return page.evaluate(
        """types => {
            app.graph.clear();
            const nodes = types.map((type, place) => {
                const node = LiteGraph.createNode(type);
                node.pos = [place * 460, 0];
                app.graph.add(node);
                return node;
            });
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [120, 160];
            app.canvas.setDirty(true, true);
            return nodes.map(node => node.id);
        }""",
        list(types),
    )


def set_widget(page: Any, node: Any, name: str, value: Any) -> None:
    page.evaluate(
        """([node, name, value]) => {
            const widget = app.graph.getNodeById(node).widgets.find(widget => widget.name === name);
            widget.value = value;
            widget.callback?.(value);
        }""",
        [node, name, value],
    )


def serialized(page: Any, node: Any) -> dict[str, Any]:
    """The node as a saved workflow contains it."""
    found = page.evaluate("node => app.graph.serialize().nodes.find(one => one.id == node)", node)
    return json.loads(json.dumps(found))
