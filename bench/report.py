"""The output of a bench: a table, a JSON object as the last line, and both in bench/results/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .host import CACHE, RESULTS, ROOT, comfyui

Row = dict[str, Any]


def not_measured(why: str) -> str:
    """The text of a cell without a number."""
    return f"not measured: {why}"


def name_of(argument: str) -> str:
    """The argument. Of a path on this machine, only the last name."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def environment(**more: Any) -> dict[str, Any]:
    """Everything that is needed to repeat a run."""
    return {
        "command": " ".join(["python", *(name_of(argument) for argument in sys.argv)]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": host_version(),
        **more,
    }


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"CPU, {(names or [platform.processor() or platform.machine()])[0]}"


def device_slug() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def host_version() -> str:
    found = re.search(r'"(.+)"', (comfyui() / "comfyui_version.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "unknown"


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.0995 or value == 0 else f"{value:.2g}"
    return str(value)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table that is also aligned in a terminal."""
    lines = [list(columns), *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def publish(bench: str, title: str, stem: str, result: dict[str, Any], columns: Sequence[str], quick: bool) -> None:
    """Print the table of `result["rows"]` and write it with everything else in `result`."""
    print(f"\n{title}\n\n{table(result['rows'], columns)}\n", flush=True)
    keep(bench, title, stem, result, columns, quick)


def keep(bench: str, title: str, stem: str, result: dict[str, Any], columns: Sequence[str], quick: bool) -> None:
    """Write the result without printing, so that an interrupted run leaves what it has."""
    shown = table(result["rows"], columns)
    folder = (CACHE if quick else RESULTS) / bench  # a smoke run measures nothing
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    facts = {name: value for name, value in result.items() if not isinstance(value, list | dict)}
    facts |= result.get("environment", {})
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    (folder / f"{stem}.md").write_text(f"# {title}\n\n{shown}\n\n{listed}\n", encoding="utf-8")


def print_json(result: Any) -> None:
    """The last line of every bench."""
    print(json.dumps(result), flush=True)


def run_bench(
    name: str, *arguments: str, timeout: float | None = None, echo: bool = False
) -> tuple[dict[str, Any] | None, str]:
    """Run a benchmark in a process of its own. -> the object in its last line; or None and the reason

    echo: print its other lines while it runs. After `timeout` seconds it is ended, with all its child processes.
    """
    command = [sys.executable, str(ROOT / "bench" / "run.py"), name, *arguments]
    is_group = timeout is not None and os.name == "posix"  # its child processes end with it
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=is_group
        )
        watchdog = threading.Timer(timeout or 1e6, end, [process, is_group])
        watchdog.daemon = True
        watchdog.start()
        last = ""
        try:
            for line in process.stdout or ():
                if echo and last:
                    print(last, flush=True)
                last = line.rstrip("\n")
            code = process.wait()
        except BaseException:
            end(process, is_group)
            raise
        finally:
            watchdog.cancel()
        if code == 0 and last.startswith("{"):
            return json.loads(last), ""
        if echo and last:
            print(last, flush=True)
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if timeout and time.monotonic() - begun >= timeout:
        return None, f"ended after {timeout:.0f} s"
    return None, said[-1] if said else f"exit code {code}"


def end(process: subprocess.Popen[str], is_group: bool) -> None:
    if is_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
