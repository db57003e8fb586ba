"""The demo: a real ComfyUI trains an adapter on pictures of one subject, loads it and draws with it.

It queues `workflows/train_then_apply.json`, the graph that people open from the host's menu, through `/prompt`.
"""

import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from PIL import Image

from demo.base.weights import WEIGHTS
from demo.sheet import Row, draw_sheet
from tests.host.client import Graph, HostClient
from tests.host.server_process import ServerProcess
from tests.host.workflow_to_prompt import workflow_to_prompt

log = logging.getLogger("demo")

BASE = ROOT / ".demo"  # the host's base directory: models, input, output
CHECKPOINT = BASE / "models" / "checkpoints" / "sa-inject-demo.safetensors"
SUBJECT = ROOT / "demo" / "subjects" / "robot"
INPUT_FOLDER = "sa-inject-demo"
WORKFLOW = ROOT / "workflows" / "train_then_apply.json"
SHEET = BASE / "sheet.png"

SETTINGS: dict[str, dict] = json.loads(
    (ROOT / "demo" / "packs" / "sa_inject_demo" / "web" / "settings.json").read_text(encoding="utf-8")
)  # the same as `dev.py serve` opens with
TRAINING, SAMPLING = SETTINGS["TrainSAInjectAdapter"], SETTINGS["KSampler"]
PLACEHOLDER, CLASS_WORD, SIDE = (TRAINING[name] for name in ("placeholder_token", "class_word", "resolution"))
PROMPTS = (
    "a large {} on the left, red background",
    "a small {} on the right, purple background",
    "a large {} on the right, green background",
)  # combinations of side and colour that the subject's pictures do not have


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    started = time.monotonic()
    pictures = sorted(SUBJECT.glob("*.png"))
    shutil.copytree(SUBJECT, BASE / "input" / INPUT_FOLDER, dirs_exist_ok=True)

    log.info("Starting ComfyUI")
    with ServerProcess(Path(os.environ["COMFYUI_PATH"]), BASE, {"sa-inject": ROOT}) as server:
        graph = demo_graph(server.client)
        rows = [draw(server.client, with_prompt(graph, prompt), prompt) for prompt in PROMPTS]
    base_name = (
        "Base model, with the class word" if WEIGHTS.exists() else "Base model: random weights, so it draws noise"
    )
    draw_sheet([Image.open(picture) for picture in pictures], base_name, rows, SHEET)

    newest = max((BASE / "models" / "sa_inject").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    log.info("")
    log.info("The sheet:   %s", SHEET)
    log.info("The adapter: %s (%.1f MB)", newest, newest.stat().st_size / 1e6)
    log.info("Done in %.0f s.", time.monotonic() - started)
    log.info("To see the same graph in a browser: python dev.py serve, open the address that it prints, and press Run.")


def demo_graph(client: HostClient) -> Graph:
    """The shipped workflow with the demo's settings, in the format of `/prompt`."""
    graph = workflow_to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), client.object_info())
    for node in graph.values():
        node["inputs"].update(SETTINGS.get(node["class_type"], {}))
    return graph


def with_prompt(graph: Graph, prompt: str) -> Graph:
    """The graph with other prompts. The host caches the training."""
    changed = json.loads(json.dumps(graph))
    for node in changed.values():
        text = node["inputs"].get("text")
        if node["class_type"] == "CLIPTextEncode" and text:
            subject = f"{PLACEHOLDER} {CLASS_WORD}" if PLACEHOLDER in text else CLASS_WORD
            node["inputs"]["text"] = prompt.format(subject)
    return changed


def draw(client: HostClient, graph: Graph, prompt: str) -> Row:
    words = prompt.format(f"{PLACEHOLDER} {CLASS_WORD}")
    log.info("Queued: %s", words)
    with client.listen() as events:
        prompt_id = client.queue(graph, extra_pnginfo={"workflow": json.loads(WORKFLOW.read_text(encoding="utf-8"))})
        show_progress(client, events, prompt_id)
        outputs = client.wait(prompt_id)["outputs"]
    by_prefix = {
        node["inputs"]["filename_prefix"]: client.images({"": outputs[number]})
        for number, node in graph.items()
        if node["class_type"] == "SaveImage"
    }
    return Row(words, by_prefix["sa_inject/base"], by_prefix["sa_inject/adapter"])


def show_progress(client: HostClient, events: list, prompt_id: str, every: float = 5.0) -> None:
    """Show the host's progress in the terminal until the prompt is done: in one line, or one line now and then."""
    on_terminal = sys.stdout.isatty()
    shown, last = 0, ""
    while not client.get(f"/history/{prompt_id}"):
        time.sleep(0.5 if on_terminal else every)
        texts = [event["data"]["text"] for event in events[shown:] if event["type"] == "progress_text"]
        shown = len(events)
        if not texts or texts[-1] == last:
            continue
        last = texts[-1]
        if on_terminal:
            print(f"\r  {last:<70}", end="", flush=True)
        else:
            log.info("  %s", last)
    if on_terminal and last:
        print()


if __name__ == "__main__":
    main()
