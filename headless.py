"""Train adapters without a browser: `python headless.py jobs.toml`. docs/headless.md describes the file.

Under `accelerate launch`, each process trains some of the jobs. With `data_parallel = true`, all processes train every
job, and share its batches.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parent
PACK = "sa_inject"
LONGEST_WAIT = datetime.timedelta(days=30)  # for other processes, which may train longer

log = logging.getLogger("sa_inject.headless")


class JobError(Exception):
    """A jobs file or an installation that cannot be used. The message says what to do."""


def main(arguments: list[str]) -> int:
    """Train all jobs. -> exit code: 0 all are trained; 1 some failed; 2 no job could start; 130 interrupted"""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="headless.py", description=__doc__)
    parser.add_argument("jobs", type=Path, help="a TOML file; everything after -- goes to ComfyUI, as in: -- --lowvram")
    file: Path = parser.parse_args(arguments[:split]).jobs
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings = read_jobs(file)
        workers = Processes.launched(uses_cpu="--cpu" in arguments[split:])
        start_comfyui(find_comfyui(), arguments[split + 1 :])
        failed = train_all(settings, file.absolute().parent, workers)
    except JobError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("Stopped. Run the same command again to resume.")
        return 130
    return 1 if failed else 0


# --- the file ---------------------------------------------------------------------------------------------------------


def read_jobs(file: Path) -> dict[str, Any]:
    """{"data_parallel": bool, "jobs": [...]}. Raises JobError."""
    try:
        import tomllib  # pyright: ignore[reportMissingImports]
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise JobError("Python 3.10 cannot read TOML files by itself. Run: pip install tomli") from None
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{file} is no TOML file: {error}.") from error
    jobs = found.get("jobs")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        raise JobError(f"{file} holds no jobs. Write a table [[jobs]] for each, with checkpoint and images.")
    unknown = set(found) - {"jobs", "data_parallel"}
    if unknown or not isinstance(found.get("data_parallel", False), bool):
        raise JobError(f"{file}: beside [[jobs]] there may be only data_parallel = true, and not {sorted(unknown)}.")
    return {"data_parallel": found.get("data_parallel", False), "jobs": jobs}


# --- ComfyUI ----------------------------------------------------------------------------------------------------------


def find_comfyui() -> Path:
    """The folder in COMFYUI_PATH, or the one whose custom_nodes holds this pack. Raises JobError."""
    named = os.environ.get("COMFYUI_PATH")
    folders = [Path(named).expanduser().absolute()] if named else [ROOT.parents[1], ROOT.resolve().parents[1]]
    for folder in folders:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder
    raise JobError(
        f"There is no ComfyUI in {folders[0]}. Set COMFYUI_PATH to the folder that holds its main.py, or put this pack "
        "into its custom_nodes."
    )


def start_comfyui(comfyui: Path, arguments: list[str]) -> None:
    """Make ComfyUI's modules and this pack importable. `arguments` are ComfyUI's own."""
    # Both have a top-level folder called nodes, so ours must not be on the path.
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT.resolve()]
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", *arguments]
    import comfy.options

    comfy.options.enable_args_parsing()
    # Before nodes.py puts comfy/, with its utils.py, on the path.
    extra_config = importlib.import_module("utils.extra_config")
    import comfy.utils
    import torch
    from comfy.cli_args import args

    args.cpu = args.cpu or not (torch.cuda.is_available() or args.directml is not None or _has_other_device())
    for paths in [comfyui / "extra_model_paths.yaml", *(args.extra_model_paths_config or [[]])[0]]:
        if Path(paths).is_file():
            extra_config.load_extra_path_config(str(paths))
    comfy.utils.set_progress_bar_global_hook(ProgressBars())
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    sys.modules[PACK] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module(f"{PACK}.nodes.host.files").register_folder()


def _has_other_device() -> bool:
    import torch

    return torch.backends.mps.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())


class ProgressBars:
    """Show ComfyUI's progress bars in the terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, value: int, total: int, *ignored: Any, **others: Any) -> None:
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(total=total, unit="step")
        self._bar.update(value - self._bar.n)
        if value >= total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


# --- processes --------------------------------------------------------------------------------------------------------


class Processes:
    """The processes of `accelerate launch`, as the trainer's `Workers`."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    @classmethod
    def launched(cls, uses_cpu: bool) -> Processes | None:
        """The processes, or None if this process is the only one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        import torch
        from accelerate import Accelerator, InitProcessGroupKwargs

        uses_cpu = uses_cpu or not torch.cuda.is_available()
        return cls(Accelerator(cpu=uses_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]))

    def sum(self, tensor: Any) -> Any:
        return self._accelerator.reduce(tensor, reduction="sum")

    def share(self, data: bytes | None) -> bytes | None:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([data])[0]

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


# --- training ---------------------------------------------------------------------------------------------------------


def train_all(settings: dict[str, Any], folder: Path, workers: Processes | None) -> int:
    """Train this process's jobs, or with `data_parallel` all jobs together with the others. -> number of failed jobs

    After a failed job the next one is trained, except if processes train together.
    """
    jobs: list[dict[str, Any]] = settings["jobs"]
    together = workers is not None and settings["data_parallel"]
    mine = list(enumerate(jobs, start=1))
    if workers is not None and not together:
        mine = mine[workers.rank :: workers.count]
    if workers is None and settings["data_parallel"]:
        log.warning("There is one process only, so data_parallel does nothing. Start it with accelerate launch.")
    checked = [(number, _checked(job, number, folder)) for number, job in mine]
    if workers is not None:
        how = "take every step together" if together else "share the jobs"
        log.info("%d processes %s; this is number %d.", workers.count, how, workers.rank + 1)
    failed = 0
    for number, job in checked:
        log.info("Job %d of %d: %s", number, len(jobs), job["file_name"])
        try:
            with _sharing(workers if together else None):
                _train(job)
        except Exception:
            log.exception("Job %d failed.", number)
            failed += 1
            if together:
                raise  # the others wait for this process, and accelerate ends them
    if workers is not None:
        workers.wait()  # if a process ends early, accelerate ends the others
    return failed


@contextlib.contextmanager
def _sharing(workers: Processes | None) -> Iterator[None]:
    """Inside, the processes share each training step."""
    module = importlib.import_module(f"{PACK}.trainer.workers")
    with contextlib.ExitStack() as stack:
        if workers is not None:
            stack.enter_context(module.working_with(workers))
            stack.enter_context(contextlib.suppress(module.FollowerDoneError))
        yield


def _checked(job: dict[str, Any], number: int, folder: Path) -> dict[str, Any]:
    headless = importlib.import_module(f"{PACK}.nodes.headless_job")
    try:
        return headless.checked_job(job, folder)
    except ValueError as error:
        raise JobError(f"Job {number}: {error}") from error


def _train(job: dict[str, Any]) -> None:
    importlib.import_module(f"{PACK}.nodes.headless_job").train_job(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
