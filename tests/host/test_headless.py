"""headless.py trains as the nodes do, without a browser: alone, and in two processes."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.host.test_train import pictures

ROOT = Path(__file__).resolve().parents[2]
JOB = """
[[jobs]]
checkpoint = "sd15.ckpt"
images = "robot"
file_name = "{name}"
resolution = 64
steps = {steps}
rank = 2
alpha = 2.0
batch_size = 4
sample_every = 0
token_vectors = 2
"""


@pytest.fixture(scope="module")
def base(comfy_host, tmp_path_factory) -> Path:
    """A folder for ComfyUI with a checkpoint and pictures."""
    base = tmp_path_factory.mktemp("headless")
    for name in ("models/checkpoints", "input/robot", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(parents=True)
    os.symlink(comfy_host.checkpoint("sd15"), base / "models/checkpoints/sd15.ckpt")
    for number, picture in enumerate(pictures(4)):
        pixels = (picture * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(base / f"input/robot/{number}.png")
        (base / f"input/robot/{number}.txt").write_text(f"a [trigger] toy number {number}")
    return base


@pytest.fixture(scope="module")
def train(comfyui, base) -> Callable[..., subprocess.CompletedProcess]:
    """`train("jobs of a file", processes=2)` runs the command to its end."""

    def run(text: str, processes: int = 1) -> subprocess.CompletedProcess:
        file = base / "jobs.toml"
        file.write_text(text)
        launch = [sys.executable]
        if processes > 1:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]  # as for GPUs, on the CPU
            launch += ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
            launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*launch, str(ROOT / "headless.py"), str(file), "--", "--cpu", "--base-directory", str(base)]
        environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=base)

    return run


def adapter(base: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(base / "models/sa_inject" / f"{name}.safetensors")


def learned_in_the_node(comfy_host, base: Path, steps: int) -> dict[str, torch.Tensor]:
    """What the nodes learn from the same pictures in this process."""
    import comfy.sd

    from sa_inject.nodes.host.dataset import read_folder

    with torch.inference_mode():
        path = str(comfy_host.checkpoint("sd15"))
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(path)[:3]
        data = read_folder(base / "input/robot", "robot", "sainj")
    lists = {"images": data.images, "captions": data.captions, "masks": data.masks}
    inputs = {"resolution": 64, "steps": steps, "rank": 2, "alpha": 2.0, "batch_size": 4, "token_vectors": 2}
    more = {"file_name": "in_the_node", "previews": 0, "sample_every": 0}
    given = {"model": model, "clip": clip, "vae": vae, **lists, **inputs, **more}
    trained = comfy_host.execute("TrainSAInjectAdapter", **given)[0]
    words = {f"token_embedding.{name}": vector for name, vector in trained.token_embedding.items()}
    return {**trained.lora.state_dict(), **words}


STEPS = 3


@pytest.fixture(scope="module")
def alone(base, train) -> dict[str, torch.Tensor]:
    """What one process learns from a file."""
    result = train(JOB.format(name="alone", steps=STEPS))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Job 1 of 1: alone" in result.stderr and f"{STEPS}/{STEPS}" in result.stderr  # the progress bar
    log = (base / "models/sa_inject/alone.training/log.csv").read_text().splitlines()
    assert log[0].startswith("step,loss,") and {line.split(",")[0] for line in log[1:]} == {"1", "2", "3"}
    return adapter(base, "alone")


def test_a_file_trains_what_the_node_trains(comfy_host, pack_nodes, base, alone):
    for name, tensor in learned_in_the_node(comfy_host, base, STEPS).items():
        torch.testing.assert_close(alone[name].float(), tensor.half().float(), rtol=1e-3, atol=1e-5)


def test_the_same_file_goes_on_where_it_ended(base, alone, train):
    again = train(JOB.format(name="alone", steps=STEPS + 1))
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"ended at step {STEPS}" in again.stderr and "goes on from there" in again.stderr
    assert (base / "models/sa_inject/alone_00002.safetensors").exists()


def test_two_processes_train_the_adapter_of_one(base, alone, train):
    """Gradients are sums in another order, so their last bits differ. Adam divides each by its own size: where one is
    almost nothing, its step may differ as a whole. So tensors are compared as a whole, to 0.1 % of their length."""
    shutil.rmtree(base / "models/sa_inject/training_states")  # or nothing is trained again
    two = train("data_parallel = true\n" + JOB.format(name="two", steps=STEPS), processes=2)
    assert two.returncode == 0, two.stderr[-3000:]
    for number in (1, 2):
        assert f"2 processes take every step together; this is number {number}." in two.stderr
    assert len(list((base / "models/sa_inject").glob("two*.safetensors"))) == 1  # one writer
    together = adapter(base, "two")
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        assert relative(together[name], tensor) <= 1e-3, name


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-6)).item()


def test_jobs_are_shared_out_and_a_failed_one_is_told(base, train):
    broken = JOB.format(name="broken", steps=1) + 'placeholder_token = "toy"\n'
    jobs = [JOB.format(name="first", steps=1), broken, JOB.format(name="third", steps=1)]
    result = train("".join(jobs), processes=2)
    assert result.returncode != 0
    for number in (1, 2):
        assert f"2 processes share the jobs; this is number {number}." in result.stderr
    assert "is an ordinary word" in result.stderr or "vocabulary" in result.stderr
    names = {path.stem for path in (base / "models/sa_inject").glob("*.safetensors")}
    assert {"first", "third"} <= names and "broken" not in names


# --- what cannot work is told before anything is loaded ---------------------------------------------------------------


@pytest.fixture(scope="module")
def headless() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sa_inject_headless", ROOT / "headless.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs = 3", "holds no jobs. Write a table"),
        ("[[jobs]", "is no TOML file"),
        ("job = []\n[[jobs]]\nimages = 'x'", r"only data_parallel = true, and not \['job'\]"),
        ("data_parallel = 'yes'\n[[jobs]]\nimages = 'x'", "only data_parallel = true"),
    ],
)
def test_file_that_holds_no_jobs_is_refused(headless, tmp_path, text, message):
    file = tmp_path / "jobs.toml"
    file.write_text(text)
    with pytest.raises(headless.JobError, match=message):
        headless.read_jobs(file)
    with pytest.raises(headless.JobError, match="cannot be read: No such file"):
        headless.read_jobs(tmp_path / "other.toml")


def test_missing_comfyui_is_told(headless, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(headless.JobError, match="Set COMFYUI_PATH to the folder that holds its main.py"):
        headless.find_comfyui()


def test_comfyui_is_found_by_its_custom_nodes(headless, comfyui, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH")
    for name in ("main.py", "comfy"):
        (tmp_path / name).symlink_to(comfyui / name)
    monkeypatch.setattr(headless, "ROOT", tmp_path / "custom_nodes/sa-inject")
    assert headless.find_comfyui() == tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "it has no checkpoint"),
        ({"checkpoint": "gone.ckpt"}, "there is no checkpoint 'gone.ckpt'"),
        ({"images": None}, "it has no images"),
        ({"images": "nowhere"}, "images is 'nowhere', which is no folder"),
        ({"step": 3}, "'step' is no input of TrainSAInjectAdapter. It has: .*steps"),
        ({"steps": "3"}, "steps is '3'; it must be of the type int"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 100000"),
        ({"reference_mode": "noisy"}, "reference_mode is 'noisy'; it is one of clean, noised"),
        ({"settings": {"schedule": "step"}}, "schedule is 'step'; it is one of constant, cosine, linear"),
        ({"settings": {"optimizer": "sgd"}}, "'sgd' is not installed"),
        ({"settings": 3}, "settings is no table"),
    ],
)
def test_job_that_cannot_work_is_refused_by_name(comfy_host, pack_nodes, tmp_path, changes, message):
    from sa_inject.nodes.headless_job import checked_job

    folder = comfy_host.base / "models/checkpoints"
    (folder / "named.ckpt").touch()
    (tmp_path / "pictures").mkdir()
    job = {"checkpoint": "named.ckpt", "images": "pictures", **changes}
    job = {name: value for name, value in job.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        checked_job(job, tmp_path)
    (folder / "named.ckpt").unlink()


def test_job_has_the_defaults_of_the_nodes(comfy_host, pack_nodes, tmp_path):
    from sa_inject.nodes.headless_job import checked_job

    (comfy_host.base / "models/checkpoints/named.ckpt").touch()
    (tmp_path / "pictures").mkdir()
    job = checked_job({"checkpoint": "named.ckpt", "images": "pictures", "lora_learning_rate": 1}, tmp_path)
    assert (job["steps"], job["rank"], job["previews"], job["lora_learning_rate"]) == (400, 16, 0, 1.0)
    assert job["settings"]["schedule"] == "constant" and job["images"] == tmp_path / "pictures"
