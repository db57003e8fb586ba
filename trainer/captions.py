"""What is said about the training pictures, with the learned word in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# After DreamBooth and Textual Inversion: neutral wordings, so that the word takes up the subject and not the scene.
TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a picture of {}",
    "a close-up photo of {}",
    "a photo of the {}",
    "an image of {}",
    "{}",
)


def subject_phrase(placeholder_token: str, class_word: str) -> str:
    """How the subject is named where nothing else is said: the learned word and what kind of thing it is."""
    return f"{placeholder_token} {class_word}".strip()


def class_captions(class_word: str) -> tuple[str, ...]:
    """What is said about pictures of the class, which have nothing to do with the learned word."""
    return tuple(template.format(class_word) for template in TEMPLATES)


def captions_for(
    captions: Sequence[str] | None, count: int, placeholder_token: str, class_word: str, has_word: Callable[[str], bool]
) -> list[tuple[str, ...]]:
    """Captions of every picture; templates stand in where there is none.

    One caption alone serves all pictures. Raises ValueError for another number of captions than pictures, and when
    `has_word` finds it in none of them, for then nothing would teach the placeholder.
    """
    templates = tuple(template.format(subject_phrase(placeholder_token, class_word)) for template in TEMPLATES)
    given = [caption.strip() for caption in captions or []]
    if not any(given):
        return [templates] * count
    if len(given) == 1:
        given = given * count
    if len(given) != count:
        raise ValueError(
            f"{len(given)} captions came with {count} images. Connect one caption for each image, or one for all."
        )
    if not any(has_word(caption) for caption in given):
        raise ValueError(
            f"The placeholder token '{placeholder_token}' is in none of the captions, so it could not be learned. "
            f"Write it where the subject is named, such as "
            f"'a photo of {subject_phrase(placeholder_token, class_word)} in the snow'."
        )
    return [(caption,) if caption else templates for caption in given]
