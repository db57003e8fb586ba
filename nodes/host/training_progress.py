"""Show a training in ComfyUI: progress bar and text on the node, events for the browser, and samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management as model_management
import torch
from comfy.utils import ProgressBar
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from server import PromptServer
from torch import Tensor

from ...core.adapter import Adapter
from ...core.adapter_file import save_adapter
from ...core.atomic_write import atomic_write
from ...trainer.loop import Step, Training
from ...trainer.settings import TrainingSettings
from ...trainer.time_left import TimeLeft
from ...trainer.workers import FollowerDoneError
from .contact_sheet import contact_sheet
from .images import to_comfy
from .progress import show_on_node
from .training_runs import ENDED, TrainingRun, timestamp

log = logging.getLogger(__name__)

EVENT = "sa_inject.training"
BETWEEN_EVENTS = 0.25  # seconds
OFTEN = ("training", "validating")  # phases that may come many times in a second
PREVIEW_SIDE = 512  # pixels
UI_POINTS = 200


class TrainingProgress:
    """Reports a training, and checks for Cancel. Create it inside `execute`, and train inside `with`."""

    def __init__(
        self,
        steps: int,
        node_id: str | None,
        *,
        name: str = "training",
        words: tuple[str, str] = ("", ""),
        settings: TrainingSettings | None = None,
        prompts: Sequence[str] = (),
        draw: Callable[[Adapter], Tensor] | None = None,
    ) -> None:
        """words: the placeholder token and the class word. draw: from an adapter to pictures (n, h, w, 3)"""
        self.settings = settings or TrainingSettings()
        self._bar = ProgressBar(steps, node_id=node_id)
        self._node_id, self._prompts, self._draw = node_id, list(prompts), draw
        server = getattr(PromptServer, "instance", None)
        self.run = TrainingRun(name, steps, node=node_id, prompt_id=getattr(server, "last_prompt_id", None))
        self.run.placeholder_token, self.run.class_word = words
        self._client = getattr(server, "client_id", None)
        self._time_left = TimeLeft()
        self._sent_at, self._sent_phase = -1.0, ""
        self._training: Training | None = None

    def __enter__(self) -> TrainingProgress:
        self.enter("reading")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self.run.phase in ENDED or kind is FollowerDoneError:  # only the first process shows and writes anything
            return
        if kind is None:
            self._end("done", self.run.text)
        elif issubclass(kind, model_management.InterruptProcessingException):
            self._end("stopped", f"stopped at step {self.run.step}; queue the same again to go on")
        else:
            self._end("error", str(error) or kind.__name__)

    def show_text(self, text: str) -> None:
        self.run.text = text
        show_on_node(text, self._node_id)

    def finished(self, text: str) -> None:
        """End the run. text: whether the adapter was saved, and where."""
        if self.run.step < self.run.steps:
            text = f"{text}, finished at step {self.run.step} of {self.run.steps}"
        self.show_text(text)
        self._end("done", text)

    def begin(self, training: Training, fingerprint: str) -> None:
        run = self.run
        run.begin(fingerprint, training.losses)
        self._training, self._time_left = training, TimeLeft()
        if training.losses:
            run.text = f"goes on from step {len(training.losses)}"
        self._send(resumed_at=len(training.losses) or None)
        run.write()

    def enter(self, phase: str) -> None:
        run = self.run
        if phase == run.phase:
            return
        run.phase = phase
        change = self._time_left.begin_step if phase == "training" else self._time_left.begin_pause
        change(time.monotonic())
        if phase != "training" or not run.text.startswith("goes on"):
            run.text = {"reading": "reading the pictures", "encoding": "encoding the pictures"}.get(phase, phase)
        self._send()

    def tell(self, texts: Sequence[str]) -> None:
        """Show facts before the first step: in the log, on the node, and in the summary."""
        self.run.facts = list(texts)
        self.show_text(" ".join(texts))
        for text in texts:
            log.info("SA-Inject: %s", text)
        self._send()

    def warn(self, texts: Sequence[str]) -> None:
        """Log and show warnings. Each is shown once."""
        new = [text for text in texts if text not in self.run.warnings]
        self.run.warnings += new
        for text in new:
            log.warning("SA-Inject: %s", text)

    def on_step(self, step: Step, training: Training) -> None:
        self.update(step)

    def update(self, step: Step) -> None:
        """Show a finished step. Raises the host's InterruptProcessingException if the user cancelled."""
        run = self.run
        run.step, run.memory = step.number, _peak_memory()
        lora, token = self._training.learning_rates if self._training is not None else (None, None)
        run.add(
            step.number,
            loss=step.loss,
            learning_rate=lora,
            token_learning_rate=token,
            gradient_norm=step.gradient_norm,
            memory=run.memory,
        )
        self._update_time_left(step.number)
        shown = run.rows[step.number]["smoothed"]
        left = "" if run.left is None else f", {_duration(run.left)} left"
        self.show_text(f"step {step.number}/{run.steps}, loss {shown:.4f}{left}")
        self._bar.update_absolute(step.number, run.steps)
        self._send()
        model_management.throw_exception_if_processing_interrupted()

    def _update_time_left(self, step: int) -> None:
        time_left, left = self._time_left, self.run.steps - step
        was_known = time_left.is_known
        time_left.end_step(time.monotonic())
        self.run.left = time_left.left(left, self._pauses_from(step))
        if time_left.is_known and not was_known and self.run.left is not None:
            a_step = time_left.seconds_a_step
            log.info(
                "SA-Inject: %d steps are left, of %.2f seconds each: about %s.", left, a_step, _duration(self.run.left)
            )

    def _pauses_from(self, step: int) -> int:
        """How many times it stops for samples or validation, from behind this step on."""
        draws = self.settings.sample_every if self._draw is not None else 0
        measures = self.settings.validation_every or draws
        return max(_due_from(step, self.run.steps, every) for every in (draws, measures))

    def on_validation(self, step: int, loss: float) -> None:
        self.run.add(step, validation=loss)

    def wants_sample(self, step: int, is_last: bool) -> bool:
        requested, self.run.wants_sample = self.run.wants_sample, False
        if self._draw is None:
            return False
        every = self.settings.sample_every
        is_due = every > 0 and (is_last or step % every == 0)
        return (requested or is_due) and step not in self.run.prompts

    def wants_finish(self) -> bool:
        return self.run.wants_finish

    def draw(self, step: int, adapter: Adapter, is_last: bool) -> None:
        assert self._draw is not None
        run = self.run
        pictures = [to_pil(picture) for picture in self._draw(adapter)]
        for index, (picture, prompt) in enumerate(zip(pictures, self._prompts, strict=True)):
            _write_picture(run, step, index, picture, prompt)
        run.prompts[step] = self._prompts
        if self.settings.kept > 0 and step > 0 and not is_last:
            _keep(run, step, adapter, self.settings.kept)
        self._bar.update_absolute(run.step, run.steps, ("JPEG", contact_sheet([(step, pictures)]), PREVIEW_SIDE))
        self._send(sample=step)
        run.write()
        model_management.throw_exception_if_processing_interrupted()

    def sheet(self) -> Tensor | None:
        """All samples of this training, a row for each step. -> IMAGE (1, h, w, 3)"""
        rows = []
        for sample in self.run.samples():
            try:
                paths = [self.run.sample_path(sample["step"], index) for index in sample["images"]]
                rows.append((sample["step"], [Image.open(path).convert("RGB") for path in paths]))
            except OSError:  # deleted during the training
                continue
        return from_pil(contact_sheet(rows)) if rows else None

    def ui(self) -> dict[str, Any]:
        return {"sa_inject_training": [self.run.as_dict(UI_POINTS)]}

    def _end(self, phase: str, text: str) -> None:
        self.run.end(phase, text)
        self._send()

    def _send(self, resumed_at: int | None = None, sample: int | None = None) -> None:
        """Send an event to the browser that queued the training: at most four a second, but all that are rare."""
        run, now = self.run, time.monotonic()
        is_other_phase = run.phase != self._sent_phase and run.phase not in OFTEN
        must_send = is_other_phase or sample is not None or resumed_at is not None
        if now - self._sent_at < BETWEEN_EVENTS and not must_send:
            return
        self._sent_at, self._sent_phase = now, run.phase
        server, row = getattr(PromptServer, "instance", None), run.rows.get(run.step, {})
        names = ("loss", "smoothed", "validation", "learning_rate", "token_learning_rate", "gradient_norm")
        event = {
            "node": run.node,
            "run": run.name,
            "prompt_id": run.prompt_id,
            "updated_at": timestamp(),
            "phase": run.phase,
            "text": run.text,
            "step": run.step,
            "steps": run.steps,
            "resumed_at": resumed_at,
            **{name: row.get(name) for name in names},
            "seconds": round(run.seconds, 3),
            "left": run.left,
            "memory": run.memory,
            "sample": sample,
            "warnings": len(run.warnings),
            "facts": len(run.facts),
        }
        if server is not None and self._client is not None:
            server.send_sync(EVENT, event, self._client)


def to_pil(picture: Tensor) -> Image.Image:
    """(h, w, 3) in 0..1"""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    width, height = picture.size
    flat = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return to_comfy(flat.view(1, height, width, 3).movedim(-1, 1).float() / 255)


def _write_picture(run: TrainingRun, step: int, index: int, picture: Image.Image, prompt: str) -> None:
    text = PngInfo()
    text.add_text("sa_inject", json.dumps({"run": run.name, "step": step, "prompt": prompt}))
    text.add_text("parameters", f"{prompt}\nSA-Inject step: {step}")
    with run.disk(), atomic_write(run.sample_path(step, index)) as temporary:
        picture.save(temporary, "PNG", pnginfo=text)


def _keep(run: TrainingRun, step: int, adapter: Adapter, count: int) -> None:
    with run.disk():
        save_adapter(adapter, run.kept_path(step), {})
        for old in run.kept()[:-count]:
            run.kept_path(old).unlink(missing_ok=True)


def _due_from(step: int, steps: int, every: int) -> int:
    """How many steps from this one on are multiples of `every`, or the last one. 0 where `every` is not positive."""
    return -(-steps // every) - (step - 1) // every if every > 0 else 0


def _peak_memory() -> int | None:
    """Peak memory of the device in bytes. None without CUDA."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
