"""Names that were retired stay retired, and what people read is written in short sentences."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("*.py", "core/**/*.py", "trainer/**/*.py", "nodes/**/*.py", "bench/**/*.py", "demo/**/*.py")
LONGEST = 30  # words in a sentence; the style guide asks for 25

# old name: the field's name, which is used instead
RETIRED = {
    "AS_TRAINED": "TRAINED_STRENGTH",
    "AS_USUAL": "PLAIN_SETTINGS",
    "AdapterMismatch": "AdapterMismatchError",
    "Average": "PolynomialAverage",
    "CLEAN_READ_AT": "CLEAN_NOISE_FRACTION",
    "CONDITIONAL": "COND",
    "Cell": "Result",
    "Cells": "ResultStore",
    "Deltas": "LoRADeltas",
    "Diverged": "DivergedError",
    "HIDDEN": "HIDDEN_STATES_KEY",
    "JoinedPictures": "BatchedReferences",
    "KEEP_ABOVE": "MASK_THRESHOLD",
    "LargerCall": "ExtendedBatch",
    "Lesson": "TrainingTask",
    "LowRank": "LoRADelta",
    "MAX_PLACE": "MAX_INDEX",
    "MetBlock": "PatchedBlock",
    "OWN_BEGINNINGS": "EXTRA_NOISE",
    "OwnBeginnings": "ScheduledSampling",
    "PICKLE_STARTS": "PICKLE_MAGIC",
    "Picture": "ReferenceImage",
    "Recorded": "ReferenceKV",
    "ReferencePassHooks": "KVRecorder",
    "ReferenceRecorder": "KVRecorder",
    "ReferenceText": "TextConditioning",
    "Room": "TrainingSetup",
    "SECONDS_BETWEEN": "SAVE_INTERVAL_SECONDS",
    "SNAP": "SIZE_MULTIPLE",
    "Stop": "CommandError",
    "Taught": "TrainedModel",
    "TokenizerWithWord": "PlaceholderTokenizer",
    "ToldTheLevel": "WithTimestep",
    "TransformerRead": "TransformerReferencePass",
    "USUAL_STRENGTH": "DEFAULT_STRENGTH",
    "Unfinished": "TrainingCheckpoint",
    "UnreadablePicture": "UnreadablePictureError",
    "UnusableMetadata": "UnusableMetadataError",
    "Watched": "ObservedAttention",
    "Watcher": "AttentionObserver",
    "WithChance": "WithGenerator",
    "_alike": "_batchable_groups",
    "_earlier": "resumed steps, or what is wrapped",
    "_give_back": "_unload",
    "_is_ours": "_has_our_format",
    "_let_gradients_through": "make_models_differentiable",
    "_met": "_joint_attention",
    "_say": "_update",
    "_wish": "_set_flag",
    "accumulation": "gradient_accumulation",
    "around_preparation": "prepare_sampling_wrapper",
    "around_sampling": "outer_sample_wrapper",
    "as_rows": "stack",
    "asks_for_noise_level": "needs_sigma",
    "averaging": "average_power",
    "bystander_scenes": "base_object_scenes",
    "bystanders": "base_objects",
    "class_word_vectors": "initial_token_embedding",
    "classroom": "training_setup",
    "clean_sigma": "clean_reference_sigma",
    "explained": "explain_errors",
    "handed_over": "project_keys_values",
    "has_room": "fits_in_memory",
    "injection_for": "build_injection",
    "is_told_guidance": "has_guidance_input",
    "is_told_of_compilation": "has_warned_of_compilation",
    "keep_hidden": "store_hidden_states",
    "kept_tokens": "token_mask",
    "lean_activations": "recompute_cheap_ops",
    "lean_conv2d": "frozen_conv2d",
    "lean_layers": "memory_efficient_layers",
    "lean_linear": "frozen_linear",
    "level_to_tell": "nearest_level",
    "lined_up": "concatenate_kv",
    "looked_at_sheet": "attention_sheet",
    "masks_of": "split_masks",
    "matched": "noised",
    "may_take": "can_append",
    "network_loss": "prediction_loss",
    "normal_tensor": "clone_for_autograd",
    "out_of_the_way": "without_foreign_forwards",
    "own_forward": "patched_forward",
    "pictures_of": "split_images",
    "read_image_prompt": "encode_references",
    "reads_to_the_end": "needs_full_pass",
    "recomputed_activations": "checkpoint_activations",
    "run_to_last_layer": "run_reference_pass",
    "say": "show_text",
    "settle": "apply_average",
    "spare_activations": "save_activation_memory",
    "stack_conditionings": "TextConditioning.stack",
    "step_aside": "record_skip",
    "stepped_aside": "skipped",
    "taught": "patched_clip",
    "teach": "train",
    "token_weights": "downsample_mask",
    "tokens_of_each": "split_per_image",
    "told": "with_timestep",
    "truth": "target_embedding",
    "untaught": "original_lookup",
    "usual_injection": "default_injection",
    "whole_file": "atomic_write",
}


def names_in(source: str) -> set[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for files in CODE for p in ROOT.glob(files)))
def test_retired_names_stay_retired(path):
    found = names_in((ROOT / path).read_text(encoding="utf-8")) & set(RETIRED)
    assert not found, {name: f"is called {RETIRED[name]}" for name in found}


def sentences(text: str) -> Iterator[str]:
    """The sentences of plain prose. A line of a list or a cell of a table ends a sentence."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"(?m)^( {4}|\t).*$", "", text)  # code
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)  # a link is read as its text
    text = re.sub(r"<[^>]+>|`[^`]*`", "code", text)
    text = re.sub(r"(?m)^\s*\|?[\s:|-]+\|?\s*$", "\n\n", text)  # the line below a table's head, and empty lines
    text = re.sub(r"(?m)^\s*([-*]|\d+\.)\s+", "\n\n", text)
    text = re.sub(r"(?m)^#+ .*$", "\n\n", text)
    for block in re.split(r"\n\s*\n|\|", text):
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(block.split())):
            if sentence:
                yield sentence


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if len(sentence.split()) > LONGEST]


PAGES = ("*.md", "docs/*.md", "bench/README.md", "demo/README.md", "web/docs/*.md")


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT).as_posix() for pages in PAGES for p in ROOT.glob(pages)))
def test_pages_have_short_sentences(path):
    assert too_long((ROOT / path).read_text(encoding="utf-8")) == []


def shown_texts(path: Path) -> Iterator[str]:
    """Tooltips and descriptions of a node's schema."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg in ("tooltip", "description"):
            yield "".join(part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_tooltips_have_short_sentences(path):
    assert [sentence for text in shown_texts(path) for sentence in too_long(text)] == []


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


@pytest.mark.parametrize("folder", sorted({pattern.partition("/")[0] for pattern in CODE}))
def test_docstrings_have_short_sentences(folder):
    files = [path for pattern in CODE if pattern.startswith(folder) for path in ROOT.glob(pattern)]
    found = {
        f"{path.relative_to(ROOT)}: {sentence}"
        for path in files
        for text in docstrings(path.read_text(encoding="utf-8"))
        for sentence in too_long(text)
    }
    assert files and not found


def test_long_sentences_and_retired_names_are_found():
    long = "word " * 31
    assert too_long(f"Short one. {long.strip()}. Short.") == [f"{long.strip()}."]
    assert too_long(f"| {long} | cell |") == [long.strip()]
    assert too_long(f"    {long}") == []
    source = f'def f():\n    """Short.\n\n    {long}\n    """'
    assert [sentence for text in docstrings(source) for sentence in too_long(text)] == [long.strip()]
    assert names_in("x = settled.settle()  # keep_hidden") & set(RETIRED) == {"settle"}
