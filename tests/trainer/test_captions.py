"""Captions of the pictures, and captions that are refused."""

import re

import pytest

from sa_inject.trainer.captions import TEMPLATES, captions_for, subject_phrase

WORD = re.compile(r"\bsks\b")
TEMPLATED = tuple(template.format("sks teapot") for template in TEMPLATES)


def captions(given, count: int):
    return captions_for(given, count, "sks", "teapot", lambda text: bool(WORD.search(text)))


def test_subject_phrase_is_the_word_and_what_it_is():
    assert subject_phrase("sks", "teapot") == "sks teapot"
    assert subject_phrase("sks", "") == "sks"


@pytest.mark.parametrize("given", [None, [], [""], ["  ", "\n"]])
def test_without_captions_templates_stand_in(given):
    assert captions(given, 2) == [TEMPLATED, TEMPLATED]


def test_every_template_names_the_subject():
    assert all(WORD.search(caption) and "teapot" in caption for caption in TEMPLATED)
    assert len(set(TEMPLATED)) == len(TEMPLATES) > 1


def test_captions_are_used_as_given():
    assert captions(["sks on snow ", "a red sks"], 2) == [("sks on snow",), ("a red sks",)]


def test_one_caption_serves_all():
    assert captions(["a red sks"], 3) == [("a red sks",)] * 3


def test_blank_captions_get_the_templates():
    assert captions(["a red sks", " ", ""], 3) == [("a red sks",), TEMPLATED, TEMPLATED]


def test_caption_without_the_placeholder_is_allowed_beside_one_with_it():
    assert captions(["a red sks", "a red teapot"], 2) == [("a red sks",), ("a red teapot",)]


@pytest.mark.parametrize(("given", "count"), [(["a sks"] * 2, 3), (["a sks"] * 3, 2), (["a sks", ""], 1)])
def test_another_number_of_captions_is_refused_with_both_numbers(given, count):
    with pytest.raises(ValueError, match=f"{len(given)} captions came with {count} images"):
        captions(given, count)


@pytest.mark.parametrize("given", [["a teapot", "a mug"], ["asksa mug"]])
def test_captions_that_never_name_the_placeholder_are_refused(given):
    with pytest.raises(ValueError, match="'sks' is in none of the captions.*'a photo of sks teapot in the snow'"):
        captions(given, 2)
