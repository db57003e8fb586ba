"""The demo's changes to the shipped workflow before it is queued."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sa_inject.demo
from sa_inject.demo.base.scenes import COLOURS, SIDES, SIZES
from sa_inject.demo.subjects.draw import PLACEHOLDER_TOKEN, SUBJECT, reference_scenes

FOLDER = Path(sa_inject.demo.__file__).parent


@pytest.fixture
def run(monkeypatch) -> ModuleType:
    """The script, which is run by its path and knows its neighbours as `demo`."""
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "demo", sa_inject.demo)
    spec = importlib.util.spec_from_file_location("sa_inject_demo_run", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in set(sys.modules) - before:
        if name.startswith("demo"):
            del sys.modules[name]


GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "demo.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of sainj toy on the beach"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a photo of toy on the beach"}},
}


def test_a_prompt_names_the_subject_for_the_adapter_and_else_its_class(run):
    changed = run.with_prompt(GRAPH, "a large {} on the left")
    assert changed["6"]["inputs"] == {"clip": ["1", 1], "text": "a large sainj toy on the left"}
    assert changed["8"]["inputs"] == {"clip": ["1", 1], "text": "a large toy on the left"}


def test_the_empty_prompt_and_all_else_stay_as_they_were(run):
    before = copy.deepcopy(GRAPH)
    changed = run.with_prompt(GRAPH, "a large {} on the left")
    assert before == GRAPH
    assert (changed["1"], changed["7"]) == (GRAPH["1"], GRAPH["7"])


def test_a_second_prompt_replaces_the_first(run):
    twice = run.with_prompt(run.with_prompt(GRAPH, "a small {}"), "a large {} on the left")
    assert twice == run.with_prompt(GRAPH, "a large {} on the left")


def test_the_demo_trains_on_the_shipped_subject_by_the_words_in_its_captions(run):
    assert FOLDER / "subjects" / SUBJECT == run.SUBJECT
    assert (run.PLACEHOLDER, run.CLASS_WORD) == (PLACEHOLDER_TOKEN, reference_scenes()[0].artwork.class_word)


def test_prompts_ask_for_scenes_of_the_world_that_the_subjects_pictures_do_not_show(run):
    shown = [{scene.size, scene.side, scene.colour} for scene in reference_scenes()]
    for prompt in run.PROMPTS:
        asked = {*prompt.replace(",", "").split()} & {*SIZES, *SIDES, *COLOURS}
        assert len(asked) == 3 and asked not in shown
