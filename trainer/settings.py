"""What a training may be told beyond its numbers: what is seen of it while it runs, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass

NEVER = -1  # in the place of a number of steps


@dataclass(frozen=True)
class TrainingSettings:
    """Inputs of SA-Inject Training Settings, under the same names. Its defaults are what holds without that node.

    None of these changes what is learned.
    """

    sample_every: int = 0  # steps between sample pictures; 0: as the training node has it
    sample_prompts: tuple[str, ...] = ()  # none: a template with the learned word
    kept: int = 4  # adapters of the last samples that stay beside the finished one
    validation_every: int = 0  # steps between measurements; 0: at every sample; NEVER
    hold_out: bool = False  # measure at a picture that is not learned, where there are six or more
    save_every: int = 0  # steps after which the state is saved, besides every five minutes; 0: never

    def __post_init__(self) -> None:
        for name, least in (("sample_every", 0), ("kept", 0), ("validation_every", NEVER), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def prompt_lines(text: str) -> tuple[str, ...]:
    """A text with one prompt a line, as prompts."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
