"""What is seen of a training while it runs, and what stays: samples, validation, kept adapters, log and events."""

import csv
import json
import re
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

from tests.host.trainings import SMALL, pictures, tensors_of

PROMPTS = ("a photo of [trigger] toy", "a toy at night")


class Run(NamedTuple):
    adapter: Any
    losses: list[float]
    samples: torch.Tensor
    summary: dict[str, Any]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def sd15(load_checkpoint):
    return load_checkpoint("sd15")


@pytest.fixture
def folder(adapters_folder) -> Path:
    return adapters_folder


@pytest.fixture
def run(comfy_host, folder, sd15, monkeypatch) -> Callable[..., Run]:
    """`run(steps=4, settings={...})` trains through the node, and hears what the browser would."""
    import server

    monkeypatch.setattr("sa_inject.nodes.host.drawing.preview.STEPS", 2)
    monkeypatch.setattr("sa_inject.trainer.validation.LEVELS", (0.4, 0.85))  # with a reference, and without
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(server.PromptServer.instance, "client_id", "browser", raising=False)
    monkeypatch.setattr(
        server.PromptServer.instance,
        "send_sync",
        lambda event, data, sid=None: (
            events.append(data) if (event, sid) == ("sa_inject.training", "browser") else None
        ),
    )

    def train(settings: dict[str, Any] | None = None, **inputs) -> Run:
        events.clear()
        model, clip, vae = sd15
        given = {
            "model": model,
            "clip": clip,
            "vae": vae,
            "images": pictures(3),
            **SMALL,
            "file_name": "seen",
            **inputs,
        }
        if settings is not None:
            (given["settings"],) = comfy_host.execute("SAInjectTrainingSettings", **settings)
        found = comfy_host.execute("TrainSAInjectAdapter", **given)
        (summary,) = found.ui["sa_inject_training"]
        return Run(found[0], found[2]["loss"], found[4], summary, list(events))

    return train


@pytest.fixture
def stopped(run, sd15) -> Callable[..., None]:
    """`stopped(2, ...)` trains, and cancels in the step after so many."""
    import comfy.model_management as management

    def train(after: int, **inputs) -> None:
        from sa_inject.trainer.loop import Training

        with pytest.MonkeyPatch.context() as patch:
            take = Training.__next__

            def cancel(self):
                if len(self.losses) == after:
                    raise management.InterruptProcessingException
                return take(self)

            patch.setattr(Training, "__next__", cancel)
            with pytest.raises(management.InterruptProcessingException):
                run(**inputs)

    return train


def same(one: Run, other: Run) -> bool:
    ours, theirs = tensors_of(one.adapter), tensors_of(other.adapter)
    return one.losses == other.losses and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


SEEN: dict[str, Any] = {"settings": {"sample_every": 2, "sample_prompts": "\n".join(PROMPTS), "validation_every": 1}}


def test_samples_and_validation_leave_the_adapter_bit_by_bit(run, stopped, folder):
    unseen = run(steps=5)
    shutil.rmtree(folder)
    seen = run(steps=5, **SEEN)
    assert same(seen, unseen)
    shutil.rmtree(folder)
    stopped(3, steps=5, **SEEN)
    resumed = run(steps=5, **SEEN)
    assert same(resumed, unseen) and resumed.summary["resumed_at"] == [3]
    # The same is drawn and measured too, whether it was stopped or not.
    assert torch.equal(resumed.samples, seen.samples)
    assert resumed.summary["points"] == seen.summary["points"]


def test_everything_seen_lies_in_the_folder_of_the_run(run, folder):
    found = run(steps=5, **SEEN)
    here = folder / "seen.training"
    pictures_there = sorted(path.name for path in here.glob("*.png"))
    assert pictures_there == [f"{step:06}-{index}.png" for step in (0, 2, 4, 5) for index in (0, 1)]
    with Image.open(here / "000002-0.png") as picture:
        assert picture.size == (64, 64)
        assert json.loads(picture.info["sa_inject"]) == {"run": "seen", "step": 2, "prompt": "a photo of sainj toy"}
    assert sorted(path.name for path in here.glob("*.safetensors")) == ["000002.safetensors", "000004.safetensors"]
    with (here / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    assert losses == dict(enumerate(found.losses, start=1))
    assert {int(row["step"]) for row in rows if row["validation"]} == {0, 1, 2, 3, 4, 5}
    steps = [row for row in rows if row["loss"]]
    assert all(float(row["learning_rate"]) == 1e-3 and float(row["gradient_norm"]) > 0 for row in steps)
    assert found.samples.shape[0] == 1 and found.samples.shape[-1] == 3
    assert found.samples.shape[1:3] == (4 * (64 + 16), 2 * 64)


def test_the_summary_tells_the_run(run):
    found = run(steps=5, **SEEN).summary
    assert found["run"] == "seen" and found["phase"] == "done" and found["text"] == "saved seen.safetensors"
    assert (found["step"], found["steps"], found["resumed_at"]) == (5, 5, [])
    assert [point[0] for point in found["points"]] == [0, 1, 2, 3, 4, 5]
    assert [sample["step"] for sample in found["samples"]] == [0, 2, 4, 5]
    first, *_ = found["samples"]
    assert (first["step"], first["images"]) == (0, [0, 1]) and first["drawn_at"] > 1.7e9  # seconds since 1970
    assert first["prompts"] == ["a photo of sainj toy", "a toy at night"]
    assert found["kept"] == [2, 4] and (found["placeholder_token"], found["class_word"]) == ("sainj", "toy")


@pytest.mark.parametrize("token_learning_rate, is_frozen", [(0.0, True), (1e-3, False)])
def test_texts_of_samples_are_encoded_once_while_the_word_is_frozen(run, sd15, folder, token_learning_rate, is_frozen):
    calls = []
    handle = sd15[1].cond_stage_model.clip_l.transformer.register_forward_pre_hook(
        lambda *_: calls.append(torch.is_inference_mode_enabled())
    )

    def encoded_while_drawing(sample_every: int) -> int:
        calls.clear()
        run(steps=4, sample_every=sample_every, token_learning_rate=token_learning_rate)
        shutil.rmtree(folder)
        return sum(calls)

    at_both_ends, at_every_step = encoded_while_drawing(4), encoded_while_drawing(1)
    handle.remove()
    assert at_both_ends > 0
    assert (at_every_step == at_both_ends) is is_frozen


def test_a_kept_adapter_is_the_one_of_that_number_of_steps(run, folder):
    from sa_inject.core.adapter_file import load_adapter

    run(steps=4, sample_every=2)
    kept = load_adapter(folder / "seen.training" / "000002.safetensors")
    shutil.rmtree(folder)
    short = run(steps=2)
    assert all(torch.equal(tensors_of(kept)[name], tensor) for name, tensor in tensors_of(short.adapter).items())


def test_only_the_last_adapters_are_kept(run, folder, comfy_host):
    run(steps=4, settings={"sample_every": 1, "kept": 2})
    assert sorted(path.name for path in (folder / "seen.training").glob("0*.safetensors")) == [
        "000002.safetensors",
        "000003.safetensors",
    ]
    names = comfy_host.node("LoadSAInjectAdapter").INPUT_TYPES()["required"]["adapter_name"][1]["options"]
    assert names == ["seen.safetensors", "seen.training/000002.safetensors", "seen.training/000003.safetensors"]
    adapter, _ = comfy_host.execute("LoadSAInjectAdapter", adapter_name=names[1])
    assert adapter.info.training["steps"] == 2


def test_another_training_of_the_name_puts_the_earlier_one_aside(run, folder):
    run(steps=2, sample_every=1)
    other = run(steps=2, sample_every=2, seed=7)
    assert [sample["step"] for sample in other.summary["samples"]] == [0, 2]
    assert other.summary["kept"] == [] and other.summary["resumed_at"] == []
    (aside,) = (path for path in (folder / "seen.training").iterdir() if path.is_dir())
    assert (aside / "log.csv").exists() and (aside / "000001.safetensors").exists()


def test_the_browser_is_told_at_most_four_times_a_second(run):
    found = run(steps=6, **SEEN)
    assert found.events[0]["phase"] == "reading" and found.events[-1]["phase"] == "done"
    assert [event["sample"] for event in found.events if event["sample"] is not None] == [0, 2, 4, 6]
    # But for a phase that seldom begins, which a slow machine may be in for a minute.
    begun = [
        after
        for before, after in zip(found.events, found.events[1:], strict=False)
        if after["phase"] != before["phase"] and after["phase"] not in ("training", "validating")
    ]
    assert {"encoding", "sampling", "saving"} <= {event["phase"] for event in begun}
    others = [event for event in found.events[1:-1] if event not in begun]
    spontaneous = [event["seconds"] for event in others if event["sample"] is None]
    assert all(later - earlier >= 0.24 for earlier, later in zip(spontaneous, spontaneous[1:], strict=False))
    assert set(found.events[0]) == {
        *("node", "run", "prompt_id", "phase", "text", "step", "steps", "resumed_at", "loss", "smoothed", "validation"),
        *("learning_rate", "token_learning_rate", "gradient_norm", "seconds", "left", "memory", "sample"),
        *("updated_at", "warnings", "facts"),
    }


def test_a_resumed_run_says_from_where(run, stopped):
    stopped(2, steps=4)
    assert [event["resumed_at"] for event in run(steps=4).events if event["resumed_at"]] == [2]


def test_time_left_after_a_resume_is_that_of_this_process(run, stopped, monkeypatch):
    from sa_inject.nodes.host.training_progress import TrainingProgress
    from sa_inject.trainer.loop import Training

    stopped(2, steps=8)
    take, update, told = Training.__next__, TrainingProgress.update, {}

    def slow_at_first(self):
        if len(self.losses) == 2:
            time.sleep(4)
        return take(self)

    def heard(self, step):
        update(self, step)
        told[step.number] = (self.run.left, self.run.text)

    monkeypatch.setattr(Training, "__next__", slow_at_first)
    monkeypatch.setattr(TrainingProgress, "update", heard)
    run(steps=8)
    assert [told[step][0] for step in (3, 4)] == [None, None] and "left" not in told[4][1]
    for step in (5, 6, 7):
        assert 0 < told[step][0] < 4 * (8 - step) and told[step][1].endswith(" left")
    assert told[8][0] == 0


def test_samples_that_are_still_to_come_count_for_the_time_left(run, monkeypatch):
    from sa_inject.nodes.host import training_progress

    now, told = [0.0], []
    monkeypatch.setattr(training_progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    update = training_progress.TrainingProgress.update
    draw = training_progress.TrainingProgress.draw

    def after_a_second(self, step):
        now[0] += 1
        update(self, step)
        told.append(self.run.left)

    def in_ten_seconds(self, *args):
        now[0] += 10
        draw(self, *args)

    monkeypatch.setattr(training_progress.TrainingProgress, "update", after_a_second)
    monkeypatch.setattr(training_progress.TrainingProgress, "draw", in_ten_seconds)
    run(steps=6, sample_every=4)
    assert told[:2] == [None, None]
    assert told[2:] == pytest.approx([3 + 20, 2 + 20, 1 + 10, 10])  # samples come behind steps 4 and 6


def test_a_stopped_and_a_failed_run_say_so(run, stopped, folder):
    from sa_inject.nodes.host.training_runs import known_run

    stopped(1, steps=3)
    shown = known_run("seen")
    assert shown is not None and shown["phase"] == "stopped" and shown["step"] == 1
    with pytest.raises(ValueError):
        run(captions="nothing of it")
    shown = known_run("seen")
    assert shown is not None and shown["phase"] == "error" and "placeholder token" in shown["text"]


def test_a_run_is_known_after_a_restart(run, monkeypatch):
    from sa_inject.nodes.host import training_runs

    summary = run(steps=3, sample_every=2).summary
    monkeypatch.setattr(training_runs, "_runs", {})
    found = training_runs.known_run("seen")
    assert found is not None and found.pop("updated_at") <= summary.pop("updated_at")  # the file was written before
    assert found == summary
    assert training_runs.known_run("../seen") is None and training_runs.known_run("") is None


@pytest.mark.parametrize("wish, after", [("wants_finish", 2), ("wants_sample", 2)])
def test_wishes_are_met_after_the_step(run, folder, monkeypatch, wish, after):
    from sa_inject.nodes.host.training_progress import TrainingProgress

    update = TrainingProgress.update

    def wished(self, step):
        update(self, step)
        if step.number == after:
            setattr(self.run, wish, True)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", wished)
        found = run(steps=5)
    if wish == "wants_sample":
        assert len(found.losses) == 5 and [sample["step"] for sample in found.summary["samples"]] == [after]
        return
    assert len(found.losses) == after and found.adapter.info.training["steps"] == after
    shutil.rmtree(folder)
    short = run(steps=after)
    assert same(found, short)


def test_training_finished_early_is_the_result_until_its_steps_change(run, folder, monkeypatch):
    from sa_inject.nodes.host.training_progress import TrainingProgress

    at_once = run(steps=6)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "wants_finish", lambda self: self.run.step == 2)
        early = run(steps=5)
    for again in (run(steps=5), run(steps=5, file_name="copy"), run(steps=2)):
        assert same(again, early) and again.adapter.info.training["steps"] == 2
    assert early.summary["text"] == "saved seen.safetensors, finished at step 2 of 5"
    assert run(steps=5).summary["text"].endswith(" already, finished at step 2 of 5")
    three = run(steps=3)
    assert three.losses == at_once.losses[:3]
    assert same(run(steps=6), at_once)


def test_folder_that_cannot_be_written_ends_nothing(run, folder, monkeypatch):
    folder.mkdir(parents=True)
    (folder / "seen.training").write_text("a file of the user's")
    found = run(steps=2, sample_every=1)
    assert len(found.losses) == 2 and (folder / "seen.safetensors").exists()
    assert any("could not be written" in warning for warning in found.summary["warnings"])


def test_what_looks_wrong_is_said_before_the_first_step(run):
    alike = pictures(3)[[0, 0, 0]] + torch.tensor([0.0, 0.01, 0.02]).view(3, 1, 1, 1)
    warnings = run(images=alike.clamp(0, 1), resolution=128, captions=["a sainj toy", "a toy", "a toy"]).summary[
        "warnings"
    ]
    assert len(warnings) == 3
    assert "look alike" in warnings[0] and "3 of 3 pictures are smaller than the resolution 128" in warnings[1]
    assert "2 of 3 captions do not hold the word 'sainj' (of pictures 2, 3)" in warnings[2]
    assert run().summary["warnings"] == []


def test_what_is_known_before_the_first_step_is_told(run, log):
    found = run(steps=2, captions=["a sainj toy", "a toy", "a sainj"])
    told, memory = found.summary["facts"]
    assert told == (
        "3 pictures, 6 pairs of a picture and an image prompt, 2 steps. 2 captions hold the word, 1 do not."
    )
    assert re.fullmatch(
        r"A step takes about \d+ MB of memory beside the loaded models; [\d.]+ GB are free on cpu\.", memory
    )
    assert [line for line in log() if told in line or memory in line] == [f"SA-Inject: {told}", f"SA-Inject: {memory}"]


def test_memory_that_may_not_last_is_warned_of_before_the_first_step(run, monkeypatch):
    monkeypatch.setattr("sa_inject.nodes.host.learning.training.free_memory", lambda device: 20 * 2**20)
    (said,) = run(steps=1, batch_size=2).summary["warnings"]
    assert re.fullmatch(
        r"A step takes about \d+ MB of memory, and 20 MB are free, so it may not last. With gradient_checkpointing "
        r"it is about \d+ MB. Lower the resolution or the batch_size as well.",
        said,
    )
    (said,) = run(steps=1, batch_size=2, gradient_checkpointing=True, seed=3).summary["warnings"]
    assert said.endswith("so it may not last. Lower the resolution or the batch_size.")


def test_a_picture_is_held_out_where_there_are_six(run):
    five, six = ({"images": pictures(count), "steps": 1} for count in (5, 6))
    on = {"settings": {"hold_out": True, "validation_every": 1}}
    off = {"settings": {"validation_every": 1}}
    assert run(**five, **on).losses == run(**five, **off, seed=1).losses
    held, whole = run(**six, **on), run(**six, **off)
    assert held.losses != whole.losses
    assert held.summary["points"][0][3] != whole.summary["points"][0][3]


def test_a_new_training_begins_with_an_adapters_values(run, folder):
    first = run(steps=3)
    shutil.rmtree(folder)
    frozen = {"lora_learning_rate": 1e-30, "token_learning_rate": 1e-30, "steps": 1}
    begun = run(adapter=first.adapter, rank=16, token_vectors=1, **frozen)
    assert begun.adapter.info.rank == 2 and len(begun.adapter.token_embedding["clip_l"]) == 4
    for name, tensor in tensors_of(first.adapter).items():
        assert torch.equal(tensors_of(begun.adapter)[name], tensor)
    from_nothing = run(**frozen)
    assert from_nothing.losses != begun.losses


def fail_in_calls(sd15, *numbers: int) -> Any:
    """Let the network run out of memory in these of its whole calls, counted from 1. -> a handle"""
    calls = []

    def fail(module, args):
        calls.append(len(args[0]))
        if len(calls) in numbers:
            raise MemoryError("no more")

    return sd15[0].model.diffusion_model.out.register_forward_pre_hook(fail)


@pytest.mark.parametrize("batch_size, failing", [(1, [1]), (1, [3]), (2, [2])])
def test_too_little_memory_is_answered_with_checkpointing_bit_by_bit(run, folder, sd15, batch_size, failing):
    undisturbed = run(steps=4, batch_size=batch_size)
    shutil.rmtree(folder)
    handle = fail_in_calls(sd15, *failing)
    found = run(steps=4, batch_size=batch_size)
    handle.remove()
    (said,) = found.summary["warnings"]
    assert "it is taken again with gradient checkpointing" in said
    assert same(found, undisturbed)


def test_still_too_little_memory_is_answered_with_fewer_pictures(run, folder, sd15):
    """The same batch, but sums over its pictures are taken in another order, which changes their last bits."""
    undisturbed = run(steps=3, batch_size=2)
    shutil.rmtree(folder)
    handle = fail_in_calls(sd15, 2, 3)
    found = run(steps=3, batch_size=2)
    handle.remove()
    first, second = found.summary["warnings"]
    assert "it is taken again with gradient checkpointing" in first
    assert "it is taken again with 1 of 2 pictures at a time" in second
    assert found.losses == pytest.approx(undisturbed.losses, rel=1e-4)
    assert found.losses[:1] == undisturbed.losses[:1]


def test_memory_that_never_lasts_ends_the_training_with_what_is_kept(run, sd15):
    calls = []

    def fail(module, args):
        calls.append(args[0])
        if len(calls) > 1:
            raise MemoryError("no more")

    handle = sd15[0].model.diffusion_model.out.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match=r"did not last for step 2.*no more.*The 1 steps before it are kept"):
        run(steps=3)
    handle.remove()
    assert run(steps=3).summary["resumed_at"] == [1]


def test_the_state_is_saved_every_so_many_steps(run, folder, stopped, monkeypatch):
    from sa_inject.nodes.host.learning.checkpoint import TrainingCheckpoint

    saved = []
    save = TrainingCheckpoint.save
    monkeypatch.setattr(
        TrainingCheckpoint, "save", lambda self, t, **more: (saved.append(len(t.losses)), save(self, t, **more))[1]
    )
    run(steps=5, settings={"save_every": 2})
    assert saved == [2, 4, 5]
