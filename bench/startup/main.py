"""The cost of the pack before anything is drawn: its import in the host, and the time from queueing Load to an adapter.

python dev.py bench startup             five starts of the real server
python dev.py bench startup --quick     one start
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..host import CACHE, ROOT, comfyui, full_size, start_host
from ..report import Row, cell, device_slug, environment, print_json, publish, run_bench

STARTS = 5
WARM_LOADS = 5
IMPORT_AT_MOST = 0.3
ADAPTER_AT_MOST_MB = 3.4
IMPORT_LINE = re.compile(r"^\s*([0-9.]+) seconds(.*): .*sa-inject$", re.MULTILINE)
COLUMNS = ("figure", "median", "at most", "values")
NAME = "bench.safetensors"
HEAVY = ("peft", "accelerate", "transformers", "diffusers")  # must not be imported with the pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--import-once", action="store_true", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--write-adapter", type=Path, help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args()
    if options.import_once:
        print_json(import_once())
    elif options.write_adapter:
        print_json(write_adapter(options.write_adapter))
    else:
        bench(options.quick)


def bench(quick: bool) -> None:
    starts = 1 if quick else STARTS
    adapter = CACHE / NAME
    written, why = run_bench("startup", "--write-adapter", str(adapter))
    if written is None:
        raise SystemExit(f"The adapter to load could not be written: {why}")
    imports, printed, cold, warm = [], [], [], []
    for number in range(starts):
        once, why = run_bench("startup", "--import-once")
        if once is None:
            raise SystemExit(f"The pack could not be imported: {why}")
        imports.append(once)
        found = start_server(adapter, 1 if quick else WARM_LOADS)
        printed.append(found["printed"])
        cold.append(found["cold"])
        warm += found["warm"]
        print(f"  start {number + 1} of {starts}", flush=True)
    rows = [
        row("import, as the host prints it, s", printed, IMPORT_AT_MOST),
        row("import and list of nodes, timed, s", [once["seconds"] for once in imports], IMPORT_AT_MOST),
        row("queue Load to adapter, first in a server, s", cold),
        row("queue Load to adapter, file changed, s", warm),
        row("rank-16 SD1.5 adapter file, MB", [written["bytes"] / 1e6], ADAPTER_AT_MOST_MB),
    ]
    early = sorted({name for once in imports for name in once["heavy"]})
    rows.append(
        {"figure": "heavy packages imported with the pack", "median": ", ".join(early) or "none", "at most": "none"}
    )
    result = {
        "bench": "startup",
        "starts": starts,
        "peft imported": "peft" in early,
        "environment": environment(),
        "rows": rows,
    }
    publish("startup", "Start-up", device_slug(), result, COLUMNS, quick)
    print_json(result)


def row(figure: str, values: list[float], at_most: float | None = None) -> Row:
    shown = ", ".join(cell(value) for value in values)
    return {"figure": figure, "median": statistics.median(values), "at most": at_most, "values": shown}


def start_server(adapter: Path, warm_loads: int) -> dict[str, Any]:
    """One start of the real server: what it prints about the pack, and the time of Load through /prompt."""
    full_size().import_packages()
    from tests.host.server_process import ServerProcess

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        (base / "models" / "sa_inject").mkdir(parents=True)
        path = Path(shutil.copy(adapter, base / "models" / "sa_inject"))
        with ServerProcess(comfyui(), base, {"sa-inject": ROOT}) as server:
            line = IMPORT_LINE.search(server.log())
            if line is None or line.group(2):
                raise SystemExit(f"The host did not import the pack:\n{server.log_tail()}")
            cold = load_seconds(server.client)
            warm = []
            for _ in range(warm_loads):
                change_a_bit(path)  # otherwise the host remembers the adapter
                warm.append(load_seconds(server.client))
    return {"printed": float(line.group(1)), "cold": cold, "warm": warm}


def change_a_bit(path: Path) -> None:
    """Change a bit of the last weight in a safetensors file, which makes it a different, valid file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def load_seconds(client: Any) -> float:
    """From the request to the host's own time stamp of success. PreviewAny is there because a graph needs an output."""
    graph = {
        "load": {
            "class_type": "LoadSAInjectAdapter",
            "inputs": {"adapter_name": NAME, "write_embedding": False},
        },
        "end": {"class_type": "PreviewAny", "inputs": {"source": ["load", 0]}},
    }
    start = time.time()
    messages = client.wait(client.queue(graph), timeout=120)["status"]["messages"]
    stamps = {kind: data["timestamp"] for kind, data in messages if "timestamp" in data}
    return stamps["execution_success"] / 1000 - start


def import_once() -> dict[str, Any]:
    """Import the pack into a running host, then list and describe its nodes, as the host does."""
    host = start_host(with_pack=False)
    host.node("PreviewAny")  # the host's own nodes are there first
    from tests.conftest import import_folder

    del sys.modules["sa_inject"]
    before = set(sys.modules)
    start = time.perf_counter()
    import_folder("sa_inject", ROOT)
    nodes = host.pack_nodes()
    seconds = time.perf_counter() - start
    for node in nodes.values():
        node.INPUT_TYPES()
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    return {"seconds": seconds, "nodes": len(nodes), "heavy": sorted(new & set(HEAVY))}


def write_adapter(path: Path) -> dict[str, int]:
    """An adapter of the usual rank for the full-size SD1.5 UNet, made from its shapes."""
    start_host()
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from sa_inject.core.adapter_file import save_adapter
    from sa_inject.core.image_prompt import TextConditioning
    from sa_inject.core.layers import self_attention_layers
    from sa_inject.nodes.host.networks.unet import UnetDescription

    from ..scenes import TEXT_TOKENS, random, untrained_adapter

    config = comfy.supported_models.SD15(full_size().SD15.unet).unet_config
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    text = TextConditioning(random(1, TEXT_TOKENS, config["context_dim"], seed=7))
    adapter = untrained_adapter(UnetDescription("SD1.x", self_attention_layers(unet)), text, "clean")
    save_adapter(adapter, path)
    return {"bytes": path.stat().st_size}
