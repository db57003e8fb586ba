"""The cost of training: seconds of an optimizer step and peak memory, against the host's LoRA and a full fine-tune.

    python dev.py bench training                      the demo's base model
    python dev.py bench training --full               full-size SD1.5 as well; on a CPU at 256 px with few steps
    python dev.py bench training --geometry sdxl      full-size SDXL at 1024 px, CUDA only
    python dev.py bench training --quick              smoke run: nothing is meant to be measured

Model, pictures, resolution, batch, rank and precision are the same for all. Seconds: the trainers take turns in one
process. Memory: each in a separate process.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..host import start_host, weights_of
from ..measure import peak_memory, spread
from ..report import Row, device_slug, environment, not_measured, print_json, publish, run_bench

NAMES = ("ours", "ours, word kept", "TrainLoraNode", "full fine-tune")
HOST_LORA, FULL = NAMES[2:]
BYTES_OF_A_PROCESS = 22e9  # so much CUDA memory for each of those whose peak is measured at the same time
CPU_SIDES = {"sd15": 256}
AT_MOST = {"seconds / LoRA": 1.00, "memory / LoRA": 0.85, "memory / full": 0.35}
COLUMNS = (
    "checkpointing",
    "trainer",
    "seconds a step",
    "seconds / LoRA",
    "spread",
    "peak GB",
    "added to loaded GB",
    "memory / LoRA",
    "memory / full",
)


def main() -> None:
    options = arguments()
    if options.memory_of:
        print_json(memory_of(options))
        return
    results = []
    for geometry in options.geometry:
        if geometry == "sdxl" and not torch.cuda.is_available():
            results.append({"geometry": geometry, "rows": [], "note": not_measured("it needs CUDA")})
            print(f"{geometry}: {results[-1]['note']}")
            continue
        results.append(bench(geometry, options))
    print_json({"bench": "training", "at most": AT_MOST, "results": results})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", choices=("demo", "narrow", "narrow-xl", "sd15", "sdxl"))
    parser.add_argument("--full", action="store_true", help="the demo's base model and full-size SD1.5")
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--side", type=int, help="pixels; the geometry's own, on a CPU 256 for sd15")
    parser.add_argument("--rounds", type=int, help="turns of each trainer, 5")
    parser.add_argument("--steps", type=int, help="steps of a turn that count, after one that does not; 3, on a CPU 2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16; on a CPU float32")
    parser.add_argument(
        "--attention", choices=("host", "pytorch"), default="pytorch", help="the host's kernel on a CPU"
    )
    parser.add_argument("--no-seconds", action="store_true", help="only memory, and the seconds seen meanwhile")
    parser.add_argument("--no-memory", action="store_true", help="only seconds")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)  # one trainer in this process
    options = parser.parse_args()
    has_cuda = torch.cuda.is_available()
    options.geometry = options.geometry or (
        ["narrow"] if options.quick else ["demo", "sd15"] if options.full else ["demo"]
    )
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.steps = options.steps or (1 if options.quick else 3 if has_cuda else 2)
    options.dtype = options.dtype or ("bfloat16" if has_cuda else "float32")
    return options


def set_up(geometry: str, options: argparse.Namespace, checkpointing: bool) -> Any:
    """A Task on a host of this process, with model and text encoder on their device."""
    host = start_host(options.attention)
    import comfy.model_management

    from ..scenes import Scene, load_model, load_text_and_vae, side_of
    from .trainers import Task

    side = options.side or (None if torch.cuda.is_available() else CPU_SIDES.get(geometry)) or side_of(geometry)
    scene = Scene(geometry, load_model(geometry, getattr(torch, options.dtype)), side)
    clip, vae = load_text_and_vae(host, geometry)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([scene.model, clip.patcher])
    gc.collect()
    return Task(host, scene, clip, vae, options.dtype, checkpointing)


def bench(geometry: str, options: argparse.Namespace) -> dict[str, Any]:
    common = ["--geometry", geometry, "--dtype", options.dtype, "--attention", options.attention]
    common += ["--steps", str(options.steps), *(["--side", str(options.side)] if options.side else [])]
    memory = memory_of_all(geometry, common, options)
    seconds, task = ({}, None) if options.no_seconds else seconds_in_turns(geometry, options)
    rows = [
        row_of(switch, name, seconds, memory, options) for switch in options.checkpointing for name in options.trainers
    ]
    side = task.scene.side if task else next((m["side"] for m in memory.values() if "side" in m), options.side)
    result = {
        "geometry": geometry,
        "side": side,
        "dtype": options.dtype,
        "attention": options.attention,
        "weights": weights_of(geometry),
        "batch": 1,
        "seeds": f"0 to {options.rounds - 1}, one a round; memory 0",
        "rounds": options.rounds,
        "steps of a round": options.steps,
        "memory is": "CUDA's allocator" if torch.cuda.is_available() else "resident set of a process",
        "environment": environment(),
        "rows": rows,
    }
    title = f"Training: {geometry} at {side} px, batch 1, {options.dtype}"
    stem = f"{geometry}-{side}-{device_slug()}"
    publish("training", title, stem, result, COLUMNS, options.quick)
    return result


def seconds_in_turns(geometry: str, options: argparse.Namespace) -> tuple[dict[tuple[str, str], Any], Any]:
    """Median seconds of a step for every round. All trainers have a turn in a round, in reverse order in every other
    round.
    """
    task = set_up(geometry, options, checkpointing=False)
    from .trainers import TRAINERS

    seconds: dict[tuple[str, str], Any] = {}
    for switch in options.checkpointing:
        for round_number in range(options.rounds):
            chosen = dataclasses.replace(task, checkpointing=switch == "on", seed=round_number)
            names = options.trainers if round_number % 2 == 0 else options.trainers[::-1]
            for name in names:
                if isinstance(seconds.get((switch, name)), str):
                    continue
                try:
                    steps = TRAINERS[name](chosen, options.steps + 1)[1:]
                except RuntimeError as error:  # usually out of memory
                    seconds[switch, name] = not_measured(f"{type(error).__name__}: {error}".splitlines()[0])
                    continue
                finally:
                    gc.collect()
                seconds.setdefault((switch, name), []).append(statistics.median(steps))
            print(f"  {geometry}, checkpointing {switch}: round {round_number + 1} of {options.rounds}", flush=True)
    return seconds, task


def memory_of_all(geometry: str, common: list[str], options: argparse.Namespace) -> dict[tuple[str, str], Any]:
    """Several processes at once on CUDA, whose allocator counts each process separately."""
    places = [(switch, name) for switch in options.checkpointing for name in options.trainers]

    def measure(place: tuple[str, str]) -> dict[str, Any]:
        switch, name = place
        found = memory_in_process(name, [*common, "--checkpointing", switch], options)
        print(f"  {geometry}, checkpointing {switch}: {name}, memory done", flush=True)
        return found

    has_cuda = torch.cuda.is_available()
    room = torch.cuda.get_device_properties(0).total_memory / BYTES_OF_A_PROCESS if has_cuda else 1
    with ThreadPoolExecutor(max(1, int(room))) as pool:
        return dict(zip(places, pool.map(measure, places), strict=True))


def memory_in_process(name: str, common: list[str], options: argparse.Namespace) -> dict[str, Any]:
    if options.no_memory:
        return {"note": not_measured("left out")}
    found, why = run_bench("training", *common, "--memory-of", name)
    return {"note": not_measured(why)} if found is None else found


def memory_of(options: argparse.Namespace) -> dict[str, Any]:
    task = set_up(options.geometry[0], options, options.checkpointing[0] == "on")
    from .trainers import TRAINERS

    with peak_memory() as memory:
        steps = TRAINERS[options.memory_of](task, options.steps + 1)[1:]
    return {
        "peak": memory.peak,
        "loaded": memory.before,
        "added": memory.added,
        "seconds": statistics.median(steps),
        "side": task.scene.side,
    }


def row_of(
    switch: str, name: str, seconds: dict[tuple[str, str], Any], memory: dict[tuple[str, str], Any], options: Any
) -> Row:
    times, used = seconds.get((switch, name)), memory[switch, name]
    row: Row = {"checkpointing": switch, "trainer": name, "memory": used, "rounds": times}
    row["peak GB"], row["added to loaded GB"] = (
        used["peak"] / 1e9 if "peak" in used else used["note"],
        used["added"] / 1e9 if "added" in used else None,
    )
    if isinstance(times, list):
        row["seconds a step"], row["spread"] = statistics.median(times), spread(times)
        lora = seconds.get((switch, HOST_LORA))
        if isinstance(lora, list):
            row["seconds / LoRA"] = row["seconds a step"] / statistics.median(lora)
    else:
        row["seconds a step"] = times or not_measured("left out")
    for column, other in (("memory / LoRA", HOST_LORA), ("memory / full", FULL)):
        theirs = memory.get((switch, other), {})
        if "peak" in used and "peak" in theirs:
            row[column] = used["peak"] / theirs["peak"]
    return row
