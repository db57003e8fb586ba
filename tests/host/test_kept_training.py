"""What was learned is kept: a training that has ended is not done again, whatever fails after its last step."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.host.trainings import same_adapter

SMALL = {
    "resolution": 64,
    "steps": 2,
    "rank": 2,
    "alpha": 2.0,
    "previews": 0,
    "sample_every": 0,
    "seed": 3,
    "file_name": "kept",
}


class Run(NamedTuple):
    steps: int  # that were taken
    adapter: Any
    losses: list[float]
    previews: torch.Tensor


@pytest.fixture
def folder(adapters_folder) -> Path:
    return adapters_folder


@pytest.fixture
def run(comfy_host, folder, sd15, monkeypatch) -> Callable[..., Run]:
    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 2)

    def train(at_step: Callable[[int], object] = lambda number: None, **inputs) -> Run:
        from sa_inject.nodes.host.training_progress import TrainingProgress

        model, clip, vae = sd15
        images = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        inputs = {"model": model, "clip": clip, "vae": vae, "images": images, **SMALL, **inputs}
        taken = []
        with pytest.MonkeyPatch.context() as patch:
            update = TrainingProgress.update

            def counted(self, step):
                taken.append(step)
                at_step(step.number)
                update(self, step)

            patch.setattr(TrainingProgress, "update", counted)
            adapter, _, losses, previews, _ = comfy_host.execute("TrainSAInjectAdapter", **inputs)
        return Run(len(taken), adapter, losses["loss"], previews)

    return train


def adapters(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def states(folder: Path) -> list[str]:
    """What is kept, as in "2-finished"."""
    return sorted(path.stem.split("-", 1)[1].lstrip("0") for path in (folder / "training_states").glob("*.pt"))


# --- queued again -----------------------------------------------------------------------------------------------------


def test_queued_again_takes_no_step_and_writes_nothing(run, folder):
    first = run()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    again = run(gradient_checkpointing=True, precision="fp32", previews=1)
    assert (first.steps, again.steps) == (2, 0)
    assert again.losses == first.losses and same_adapter(again.adapter, first.adapter) and again.adapter.name == "kept"
    assert again.previews.shape == (1, 64, 64, 3)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before
    assert states(folder) == ["2-finished"]


def test_another_file_name_is_a_copy(run, folder):
    first = run()
    copied = run(file_name="sub/copy")
    assert copied.steps == 0 and copied.adapter.name == "copy" and same_adapter(copied.adapter, first.adapter)
    assert adapters(folder) == ["kept.safetensors", "sub/copy.safetensors"]
    assert load_file(folder / "kept.safetensors").keys() == load_file(folder / "sub/copy.safetensors").keys()


def test_adapters_of_the_same_training_are_not_called_others_with_its_word(run, folder, caplog):
    def warnings() -> list[str]:
        found = [record.message for record in caplog.records if "is already that of" in record.message]
        caplog.clear()
        return found

    for inputs in ({}, {}, {"file_name": "copy"}, {"steps": 3}, {"previews": 1}):
        assert run(**inputs) and warnings() == []
    run(rank=3)
    (said,) = warnings()
    assert all(name in said for name in ("copy", "kept", "kept_00002"))
    shutil.copy(folder / "copy.safetensors", folder / "renamed.safetensors")
    assert run().steps == 0
    (said,) = warnings()
    assert "of kept_00003.safetensors." in said  # of the other rank, alone


def test_file_that_was_deleted_comes_again_and_one_that_was_changed_stays(run, folder):
    first = run()
    (folder / "kept.safetensors").write_bytes(b"precious")
    second = run()
    assert second.steps == 0 and second.adapter.name == "kept_00002" and same_adapter(second.adapter, first.adapter)
    assert (folder / "kept.safetensors").read_bytes() == b"precious"
    (folder / "kept.safetensors").unlink()
    assert run().adapter.name == "kept_00002"  # a gap does not hide it
    (folder / "kept_00002.safetensors").unlink()
    assert run().adapter.name == "kept" and adapters(folder) == ["kept.safetensors"]


def test_more_steps_go_on_and_give_what_that_number_gives_at_once(run, folder):
    run(steps=2)
    longer = run(steps=5)
    shutil.rmtree(folder)
    at_once = run(steps=5)
    assert (longer.steps, at_once.steps) == (3, 5)
    assert longer.losses == at_once.losses and same_adapter(longer.adapter, at_once.adapter)


def test_fewer_steps_begin_anew_and_leave_the_longer_training(run, folder, caplog):
    with caplog.at_level(logging.INFO):
        longer, shorter = run(steps=3), run(steps=2)
    assert shorter.steps == 2 and any("ended at step 3, and 2 are wanted" in m for m in caplog.messages)
    assert states(folder) == ["2-finished", "3-finished"]
    again = run(steps=3), run(steps=2)
    assert [found.steps for found in again] == [0, 0]
    assert same_adapter(again[0].adapter, longer.adapter) and same_adapter(again[1].adapter, shorter.adapter)
    assert not same_adapter(longer.adapter, shorter.adapter)


def test_another_training_takes_its_steps(run):
    run()
    assert run(seed=4).steps == 2


# --- what fails after the last step -----------------------------------------------------------------------------------

AFTER = {
    "building": "sa_inject.nodes.host.learning.training.AdapterTraining.build",
    "saving": "sa_inject.nodes.train.save_or_rescue",
    "word": "sa_inject.nodes.train.clip_with_token",
    "previews": "comfy.sample.sample",
    "decoding": "VAE.decode",
}


@pytest.mark.parametrize("where", AFTER)
@pytest.mark.parametrize("what", ["memory", "cancel"])
def test_whatever_fails_after_the_last_step_loses_nothing(run, folder, sd15, monkeypatch, where, what):
    import comfy.model_management as management

    error = MemoryError if what == "memory" else management.InterruptProcessingException

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if where == "decoding":
            patch.setattr(sd15[2], "decode", fail)
        else:
            patch.setattr(AFTER[where], fail)
        with pytest.raises(error):
            run(previews=1)
    again = run(previews=1)
    assert again.steps == 0 and adapters(folder) == ["kept.safetensors"]
    shutil.rmtree(folder)
    undisturbed = run()
    assert undisturbed.steps == 2 and same_adapter(again.adapter, undisturbed.adapter)


def test_class_word_is_not_encoded_after_the_last_step(run, sd15, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    def break_the_encoder(number: int) -> None:
        if number == SMALL["steps"]:
            monkeypatch.setattr(sd15[1].cond_stage_model, "encode_token_weights", fail)

    assert run(at_step=break_the_encoder).steps == 2


def test_cancel_in_the_last_step_leaves_nothing_to_train(run, folder):
    import comfy.model_management as management

    with pytest.raises(management.InterruptProcessingException):
        run(at_step=lambda number: number == 2 and management.interrupt_current_processing(True))
    assert states(folder) == ["2-stopped"] and adapters(folder) == []
    assert run().steps == 0
    assert states(folder) == ["2-finished"] and adapters(folder) == ["kept.safetensors"]


def test_a_training_that_diverges_leaves_what_had_ended_before(run, folder, sd15):
    run(steps=1)

    def no_numbers(module, args, output):
        return output * float("nan")

    handle = sd15[0].model.diffusion_model.out.register_forward_hook(no_numbers)
    with pytest.raises(RuntimeError, match="became nan at step 2"):
        run(steps=3)
    handle.remove()
    assert states(folder) == ["1-finished"] and run(steps=1).steps == 0


def test_state_that_cannot_be_written_ends_nothing(run, folder, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert run().adapter.name == "kept"
    assert any("could not be kept" in message and "No space left" in message for message in caplog.messages)
    assert states(folder) == [] and adapters(folder) == ["kept.safetensors"]


def test_finished_state_that_is_damaged_is_named(run, folder):
    run()
    (file,) = (folder / "training_states").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="ended before, and what was kept of it cannot be read") as failure:
        run()
    assert f"Delete {file} to begin anew" in str(failure.value)


# --- company ----------------------------------------------------------------------------------------------------------


def test_two_servers_on_one_folder_end_with_one_file(run, folder, tmp_path, monkeypatch):
    """The other one ends first, while ours is in its last step."""
    other = tmp_path / "other"
    first = run()
    shutil.copytree(folder, other)
    shutil.rmtree(folder)

    def other_ends(number: int) -> None:
        if number == 2:
            shutil.copytree(other, folder, dirs_exist_ok=True)

    found = run(at_step=other_ends)
    assert found.steps == 2 and same_adapter(found.adapter, first.adapter)
    assert adapters(folder) == ["kept.safetensors"] and states(folder) == ["2-finished"]


def test_state_that_another_process_removes_meanwhile_is_written_again(run, folder, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.learning.checkpoint.SAVE_INTERVAL_SECONDS", 0.0)
    assert run(at_step=lambda number: shutil.rmtree(folder)).steps == 2
    assert states(folder) == ["2-finished"] and adapters(folder) == ["kept.safetensors"]


# --- how much is kept -------------------------------------------------------------------------------------------------


def old_states(folder: Path, count: int, hours: float) -> list[Path]:
    """States of other trainings, the first the newest."""
    (folder / "training_states").mkdir(parents=True)
    paths = [folder / "training_states" / f"{number:016x}-000100-stopped.pt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * 1000)
        age = path.stat().st_mtime - 3600 * hours - number
        os.utime(path, (age, age))
    return paths


def test_the_newest_states_are_kept(run, folder):
    paths = old_states(folder, 12, hours=2)
    foreign = folder / "training_states" / "notes.txt"
    foreign.write_text("mine")
    os.utime(foreign, (0, 0))
    run()
    assert [path.exists() for path in paths] == [True] * 9 + [False] * 3
    assert foreign.exists() and "2-finished" in states(folder)


def test_states_are_kept_up_to_a_size_and_the_newest_in_any_case(run, folder, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.learning.checkpoint.KEPT_BYTES", 10)
    paths = old_states(folder, 2, hours=2)
    run()
    assert not any(path.exists() for path in paths) and states(folder) == ["2-finished"]


def test_states_of_the_last_hour_stay_for_trainings_that_are_running(run, folder):
    paths = old_states(folder, 15, hours=0.5)
    run()
    assert all(path.exists() for path in paths)
