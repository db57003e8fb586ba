"""The cost of injection while sampling: seconds and peak memory relative to plain sampling, and the lower bound.

    python dev.py bench sampling                      the demo's base model
    python dev.py bench sampling --geometry sd15      full-size SD1.5 at 512 px, random weights
    python dev.py bench sampling --geometry sdxl      full-size SDXL at 1024 px, CUDA only
    python dev.py bench sampling --graph              whole graphs through the server's /prompt as well
    python dev.py bench sampling --quick              smoke run: few steps, nothing is meant to be measured

Every variant alternates with plain sampling on the same loaded model. A ratio is that of the medians of those pairs.
"kernels" is the ratio of the times in which a CUDA device is busy.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
from typing import Any

import torch

from ..host import start_host, weights_of
from ..measure import alternate, kernel_seconds, live_tensor_bytes, peak_memory, ratio, spread
from ..report import Row, device_slug, environment, keep, not_measured, print_json, publish, run_bench

STEPS = 20
CPU_STEPS = {"sd15": 2}  # a step of the full-size UNet takes many seconds on a CPU
QUICK_STEPS, QUICK_REPEATS = 2, 1
COLUMNS = (
    "variant",
    "seconds",
    "ratio",
    *(["kernels"] if torch.cuda.is_available() else []),
    "at most",
    "limit",
    "ratio / limit",
    "at 20 steps",
    "limit at 20",
    "spread",
    "memory ratio",
    "UNet passes",
)


def main() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    options = arguments()
    has_cuda = torch.cuda.is_available()
    if options.memory_of:
        print_json(memory_of(options))
        return
    host = start_host(options.attention)
    results = []
    for geometry in options.geometry:
        if geometry == "sdxl" and not has_cuda:
            results.append({"geometry": geometry, "rows": [], "note": not_measured("it needs CUDA")})
            print(f"{geometry}: {results[-1]['note']}")
            continue
        results.append(bench(host, geometry, options))
        gc.collect()
    if options.graph:
        from .server_timing import graph_overhead

        results.append(graph_overhead(host, options.repeats, options.quick))
    print_json({"bench": "sampling", "results": results})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", choices=("demo", "narrow", "narrow-xl", "sd15", "sdxl"))
    parser.add_argument("--steps", type=int, help="20; on a CPU 2 for sd15")
    parser.add_argument("--repeats", type=int, help="pairs for each variant, 5")
    parser.add_argument("--warm-ups", type=int, help="pairs that do not count, 1; 0 on a CPU")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights: bfloat16; on a CPU float32"
    )
    parser.add_argument("--attention", choices=("host", "pytorch"), default="host", help="the kernel: host's choice")
    parser.add_argument(
        "--variants", nargs="+", default=["all"], metavar="NAME", help="all, short, or names of variants"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process a variant on a CPU")
    parser.add_argument("--graph", action="store_true", help="also time whole graphs through the server")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one variant in this process, for the resident set
    options = parser.parse_args()
    options.geometry = options.geometry or (["narrow"] if options.quick else ["demo"])
    options.repeats = options.repeats or (QUICK_REPEATS if options.quick else 5)
    if options.warm_ups is None:
        options.warm_ups = 1 if torch.cuda.is_available() else 0
    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    return options


def steps_of(options: argparse.Namespace, geometry: str) -> int:
    usual = STEPS if torch.cuda.is_available() else CPU_STEPS.get(geometry, STEPS)
    return options.steps or (QUICK_STEPS if options.quick else usual)


def set_up(host: Any, geometry: str, options: argparse.Namespace) -> Any:
    import comfy.model_management

    from ..scenes import Scene, load_model, side_of
    from .variants import Sampling

    scene = Scene(geometry, load_model(geometry, getattr(torch, options.dtype)), side_of(geometry))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([scene.model])
    return Sampling(host, scene, steps_of(options, geometry))


def bench(host: Any, geometry: str, options: argparse.Namespace) -> dict[str, Any]:
    from sa_inject.nodes.host.networks.unet import compute_dtype

    from .lower_bound import Limit
    from .variants import PLAIN, SEED, choose_variants

    sampling = set_up(host, geometry, options)
    limit = Limit(sampling.scene)
    chosen = choose_variants(options.variants)
    sampling.run(None)  # what is done only once is done here
    memory = memory_ratios(sampling, geometry, chosen, options)
    is_target = geometry == "sd15"
    rows: list[Row] = [{"variant": PLAIN}]
    result = {
        "geometry": geometry,
        "side": sampling.scene.side,
        "steps": sampling.steps,
        "repeats": options.repeats,
        "dtype": options.dtype,
        "computed in": str(compute_dtype(sampling.scene.model.model)).removeprefix("torch."),
        "attention": options.attention,
        "weights": weights_of(geometry),
        "seed": SEED,
        "plain multiply-adds of a step": limit.plain,
        "bank of one reference, MB": limit.bank_bytes(1, masked=False) / 1e6,
        "bank of one reference with a quarter mask, MB": limit.bank_bytes(1, masked=True) / 1e6,
        "environment": environment(),
        "rows": rows,
    }
    title = f"Sampling: {geometry} at {sampling.scene.side} px, {sampling.steps} steps, cfg on, {options.dtype}"
    file = ("sampling", title, f"{geometry}-{device_slug()}", result, COLUMNS, options.quick)
    plain_kernels = kernel_seconds(lambda: sampling.run(None)) if torch.cuda.is_available() else None
    for variant in chosen:
        row = timed(sampling, variant, options)
        if plain_kernels:
            row["kernels"] = kernel_seconds(lambda: sampling.run(variant)) / plain_kernels  # noqa: B023, run at once
        least = 1.0 if variant.is_silent else limit.ratio(variant.shape, sampling.steps)
        row |= {
            "limit": least,
            "ratio / limit": row["ratio"] / least,
            "limit at 20": 1.0 if variant.is_silent else limit.ratio(variant.shape, STEPS),
            "at most": variant.at_most if is_target or variant.is_silent else None,
            "memory ratio": memory[variant.name],
        }
        rows.append(row)
        rows[0]["seconds"] = statistics.median([second for row in rows[1:] for second in row["plain seconds"]])
        rows[0]["UNet passes"] = rows[1]["plain UNet passes"]
        keep(*file)
        print(f"  {geometry}: {variant.name}, {row['ratio']:.3f} of plain", flush=True)
    result["kept after a run, MB"] = kept_after_a_run(sampling, chosen[0]) / 1e6
    publish(*file)
    return result


def timed(sampling: Any, variant: Any, options: argparse.Namespace) -> Row:
    """Seconds of the variant and of the plain runs between them."""
    clocked: dict[bool, list[Any]] = {False: [], True: []}

    def run(is_injected: bool) -> None:
        clocked[is_injected].append(sampling.clocked(variant if is_injected else None))

    plain, injected = alternate(lambda: run(False), lambda: run(True), options.repeats, options.warm_ups)
    return {
        "variant": variant.name,
        "seconds": statistics.median(injected),
        "ratio": ratio(injected, plain),
        "at 20 steps": ratio(injected, plain) if sampling.steps == STEPS else at_20(clocked, options.warm_ups),
        "spread": max(spread(plain), spread(injected)),
        "UNet passes": clocked[True][-1].unet_passes,
        "plain UNet passes": clocked[False][-1].unet_passes,
        "plain seconds": plain,
        "injected seconds": injected,
    }


def at_20(clocked: dict[bool, list[Any]], warm_ups: int) -> float | str:
    """The ratio for 20 steps, computed from measured first steps, later steps, and the time after the last."""
    if torch.cuda.is_available():
        return not_measured("with fewer steps")  # single steps are not timed there

    def seconds(runs: list[Any]) -> float:
        first = statistics.median([run.steps[0] for run in runs])
        later = statistics.median([second for run in runs for second in run.steps[1:]])
        after = statistics.median([run.after for run in runs])
        return first + (STEPS - 1) * later + after

    return seconds(clocked[True][warm_ups:]) / seconds(clocked[False][warm_ups:])


def memory_ratios(sampling: Any, geometry: str, chosen: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of every variant against plain: CUDA's allocator, or the resident set of a separate process."""
    ratios: dict[str, Any] = {variant.name: not_measured("left out") for variant in chosen}
    if options.no_memory:
        return ratios
    if torch.cuda.is_available():
        peaks = {}
        for variant in (None, *chosen):
            with peak_memory() as memory:
                sampling.run(variant)
            peaks[variant] = memory.peak
        return {variant.name: peaks[variant] / peaks[None] for variant in chosen}
    if options.quick:
        chosen = chosen[:1]  # each is a separate process
    common = ["--geometry", geometry, "--steps", "2", "--dtype", options.dtype, "--attention", options.attention]
    found, why = run_bench("sampling", *common, "--memory-of", "plain")
    if found is None:
        return {variant.name: not_measured(why) for variant in chosen}
    for variant in chosen:
        other, why = run_bench("sampling", *common, "--memory-of", variant.name)
        ratios[variant.name] = not_measured(why) if other is None else other["peak"] / found["peak"]
    return ratios


def memory_of(options: argparse.Namespace) -> dict[str, int]:
    """One run of one variant in this process."""
    sampling = set_up(start_host(options.attention), options.geometry[0], options)
    from .variants import PLAIN, VARIANTS

    variant = None if options.memory_of == PLAIN else next(v for v in VARIANTS if v.name == options.memory_of)
    with peak_memory() as memory:
        sampling.run(variant)
    return {"before": memory.before, "peak": memory.peak}


def kept_after_a_run(sampling: Any, variant: Any) -> int:
    """Bytes of tensors that remain after a run, such as a bank that is not freed."""
    before = live_tensor_bytes()
    sampling.run(variant)
    return live_tensor_bytes() - before
