"""Captions of training pictures and class pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Neutral templates, as in DreamBooth and Textual Inversion, so that the token learns the subject and not the scene.
TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a picture of {}",
    "a close-up photo of {}",
    "a photo of the {}",
    "an image of {}",
    "{}",
)


def subject_phrase(placeholder_token: str, class_word: str) -> str:
    """The name of the subject in prompts: the placeholder token and the class word."""
    return f"{placeholder_token} {class_word}".strip()


def class_captions(class_word: str) -> tuple[str, ...]:
    """Templates with the class word alone, for class pictures. They do not contain the placeholder token."""
    return tuple(template.format(class_word) for template in TEMPLATES)


def captions_for(
    captions: Sequence[str] | None, count: int, placeholder_token: str, class_word: str, has_word: Callable[[str], bool]
) -> list[tuple[str, ...]]:
    """The captions of each picture. Pictures without a caption get the templates.

    One caption alone is used for all pictures. Raises ValueError if the number of captions is wrong. Also if `has_word`
    finds the placeholder token in none of them, because nothing would train its embedding.
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
