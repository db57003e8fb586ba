"""The bookkeeping of the quality bench: tasks, scores, and the report."""

import json
import random
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, import_folder


@pytest.fixture(scope="module")
def demo(comfyui):
    """The demo under its own name, as the benches import it."""
    if "demo" not in sys.modules:
        import_folder("demo", ROOT / "demo")


@pytest.fixture(scope="module")
def subjects(demo):
    from bench.quality import subjects

    return subjects


@pytest.fixture(scope="module")
def scores(subjects):
    from bench.quality import scores

    return scores


@pytest.fixture(scope="module")
def judge(subjects):
    from demo.base.judge import Judge

    return Judge()


def test_subjects_of_the_tables_are_held_out_and_no_rate_is_chosen_on_them(subjects):
    table, sweep, choices = subjects.table_artworks(40), subjects.sweep_artworks(), subjects.choice_artworks(12)
    assert choices[: len(sweep)] == sweep and len(choices) == 12 and not set(table) & set(choices)
    assert len(set(table)) == 40 and len(sweep) == 3
    assert not set(table) & set(sweep)
    assert {artwork.split for artwork in (*table, *sweep)} == {"held_out"}


def test_prompts_ask_for_combinations_that_no_reference_shows(subjects):
    for artwork in subjects.table_artworks(5):
        subject = subjects.make_subject(artwork)
        shown = {subjects.factors(scene) for scene in subject.references}
        asked = [subjects.factors(scene) for scene in subject.prompts]
        assert len(subject.references) == 4 and len(set(asked)) == 25
        assert not shown & set(asked)


def test_more_references_change_neither_the_first_ones_nor_the_prompts(subjects):
    artwork = subjects.table_artworks(1)[0]
    four, eight = (subjects.make_subject(artwork, references=count) for count in (4, 8))
    assert eight.references[:4] == four.references
    assert eight.prompts == four.prompts


def test_a_subject_is_the_same_in_every_run(subjects):
    artwork = subjects.table_artworks(1)[0]
    assert subjects.make_subject(artwork) == subjects.make_subject(artwork)


def test_texts_name_the_subject_by_the_given_word_alone(subjects):
    subject = subjects.make_subject(subjects.table_artworks(1)[0])
    for text in (*subject.prompt_texts(subject.phrase), *subject.captions(subject.phrase)):
        assert text.count(subject.phrase) == 1
        assert subject.artwork.word not in text.replace(subject.phrase, "").split()


def test_real_scenes_score_nearly_full_and_another_subjects_scenes_do_not(artwork, judge, scores, subjects):
    from demo.base.scenes import render

    subject, other = (subjects.make_subject(found) for found in subjects.table_artworks(2))
    real = scores.score(judge, subject, [render(scene) for scene in subject.prompts], subject.prompts)
    foreign = scores.score(judge, subject, [render(scene) for scene in other.prompts], other.prompts)
    assert real.fidelity > 0.95 and real.top_3 > 0.9 and real.similarity > 0.8
    assert abs(real.copying) < 0.02
    assert foreign.fidelity > 0.95, "the scenes are as asked"
    assert foreign.top_1 == 0 and foreign.similarity < real.similarity - 0.3


def test_showing_the_references_again_is_copying(artwork, judge, scores, subjects):
    from demo.base.scenes import render

    subject = subjects.make_subject(subjects.table_artworks(1)[0])
    images = [render(subject.references[index % 4]) for index in range(25)]
    copied = scores.score(judge, subject, images, subject.prompts)
    assert copied.copying > 0.2
    assert copied.fidelity < 0.1 and copied.harmonic < 0.2


def test_harmonic_mean_of_nothing_is_nothing(scores):
    assert scores.harmonic_mean(0.0, 0.0) == 0.0
    assert scores.harmonic_mean(1.0, 0.0) == 0.0
    assert scores.harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)


def test_interval_holds_the_truth_about_as_often_as_it_says(scores):
    rng = np.random.RandomState(0)
    hits = 0
    for _ in range(200):
        _, low, high = scores.bootstrap(list(rng.normal(0.3, 1.0, size=40)))
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_pairing_removes_what_all_methods_find_hard(scores):
    difficulty = {str(i): random.Random(i).random() for i in range(12)}
    better = {name: value + 0.05 for name, value in difficulty.items()}
    mean, low, high = scores.paired(better, difficulty)
    assert mean == pytest.approx(0.05) and low == pytest.approx(0.05) and high == pytest.approx(0.05)


def test_a_cell_is_found_again_by_another_run_and_never_by_another_base(tmp_path, subjects):
    from bench.quality.results import ResultStore

    key = {"part": "main", "method": "ours", "base": "abc"}
    ResultStore(tmp_path / "results.jsonl").add(key, {"scores": {"harmonic": 0.5}})
    again = ResultStore(tmp_path / "results.jsonl")
    assert again.find(dict(reversed(key.items())))["scores"] == {"harmonic": 0.5}  # type: ignore[index]
    assert again.find({**key, "base": "abd"}) is None


def test_a_line_that_was_cut_off_loses_that_cell_only(tmp_path, subjects):
    from bench.quality.results import ResultStore

    path = tmp_path / "results.jsonl"
    ResultStore(path).add({"part": "main"}, {"scores": 1})
    with path.open("a") as lines:
        lines.write('{"key": {"part": "ra')
    results = ResultStore(path)
    assert len(results.all()) == 1
    results.add({"part": "rates"}, {"scores": 2})
    assert [result["scores"] for result in ResultStore(path).all()] == [1, 2]


def test_shares_are_told_apart_and_those_that_do_not_exist_refused(subjects):
    from bench.quality.arguments import share

    assert share("2/8") == (2, 8)
    for wrong in ("8/8", "-1/4", "1", "a/b"):
        with pytest.raises(ValueError):
            share(wrong)


def test_report_says_who_is_better_and_by_how_much(tmp_path, subjects, capsys):
    from bench.quality.report import report
    from bench.quality.results import ResultStore
    from bench.quality.subjects import Settings

    settings = Settings(steps=1, batch=1, sampler_steps=1, cfg=1.0)
    results = ResultStore(tmp_path / "results.jsonl")
    levels = {"base": 0.3, "full fine-tune": 0.8, "TrainLoraNode": 0.9, "ours, clean": 0.85, "ours, noised": 0.95}
    for index, artwork in enumerate(subjects.table_artworks(12)):
        for method, level in levels.items():
            value = level - 0.01 * index
            names = ("similarity", "top_1", "top_3", "fidelity", "size", "side", "colour", "pattern", "harmonic")
            results.add(
                {
                    "part": "main",
                    "method": method,
                    "subject": artwork.word,
                    "settings": settings._asdict(),
                    "base": "x",
                },
                {
                    "scores": dict.fromkeys(names, value) | {"copying": 0.0},
                    "parameters": 10,
                    "file_bytes": 10**6,
                    "training_seconds": 1.0,
                    "added_bytes": 0,
                    "seconds_per_image": 1.0,
                    "base_fidelity": 0.9 if method == "base" else 0.7,
                    "unseen_loss": [0.2, 0.4] if method == "base" else [0.1, 0.1],
                },
            )
    result = report(results, tmp_path, "x", settings, quick=True)
    assert json.loads(json.dumps(result)) == result
    verdict = {(row["of"], row["against"]): row for row in result["verdict"]}
    assert len(verdict) == len(result["verdict"]) == 2 * 4
    assert verdict["ours, clean", "full fine-tune"]["reached"] == "yes"
    assert verdict["ours, clean", "TrainLoraNode"]["reached"] == "no"
    assert verdict["ours, noised", "TrainLoraNode"]["reached"] == "yes"
    assert verdict["ours, clean", "full fine-tune"]["difference"].startswith("0.050 (0.050")
    assert verdict["ours, clean", "ours, noised"]["difference"].startswith("-0.100 (-0.100")
    ours = next(row for row in result["rows"] if row["method"] == "ours, clean")
    assert ours["forgetting"].startswith("0.200")
    assert ours["loss"].startswith("0.375"), "the mean of a half and a quarter"
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert "ours, clean" in (tmp_path / "quality.md").read_text()


def test_other_settings_have_tables_of_their_own(tmp_path, subjects):
    from bench.quality.report import with_other_settings
    from bench.quality.results import ResultStore
    from bench.quality.subjects import Settings

    usual = Settings(steps=1, batch=1, sampler_steps=1, cfg=1.0)
    other = usual._replace(steps=2, sampler="heun")
    results = ResultStore(tmp_path / "results.jsonl")
    scores = dict.fromkeys(("similarity", "top_1", "fidelity", "copying"), 0.5)
    for settings, levels in (
        (usual, {"full fine-tune": 0.9, "ours, clean": 0.5}),
        (other, {"full fine-tune": 0.7, "ours, clean": 0.8}),
        (usual._replace(cfg=2.0), {"full fine-tune": 0.7}),  # nothing to compare
    ):
        for method, level in levels.items():
            key = {"part": "main", "method": method, "subject": "a", "settings": settings._asdict(), "base": "x"}
            results.add(key, {"scores": scores | {"harmonic": level}})
    (found,) = with_other_settings(results, "x", usual)
    assert found["what"] == "steps 2, sampler heun"
    assert [row["subjects"] for row in found["rows"]] == [1, 1]
    assert found["verdict"][0]["difference"].startswith("0.100")
    assert with_other_settings(results, "another base", usual) == []


def test_likeness_over_time_is_of_all_steps_and_of_no_other_settings(tmp_path, subjects):
    from bench.quality.over_time import time_rows
    from bench.quality.report_plots import plot_time
    from bench.quality.results import ResultStore
    from bench.quality.subjects import Settings

    usual = Settings(steps=150, batch=1, sampler_steps=1, cfg=1.0)
    results = ResultStore(tmp_path / "results.jsonl")
    for subject, likeness in (("a", 0.2), ("b", 0.4)):
        for settings, part in (
            (usual._replace(steps=10), "time"),
            (usual._replace(steps=100), "time"),
            (usual._replace(steps=100, cfg=2.0), "time"),
            (usual, "main"),
        ):
            key = {"part": part, "method": "m", "subject": subject, "settings": settings._asdict(), "base": "x"}
            more = likeness if settings.steps == 10 else likeness + 0.3
            results.add(key, {"scores": {"similarity": more}, "training_seconds": 2.0 * settings.steps})
    ten, hundred = rows = time_rows(results, "x", usual, lambda result: {"imagenet": 0.7})
    assert (ten["steps"], hundred["steps"]) == (10, 100) and ten["subjects"] == hundred["subjects"] == 2
    assert (ten["seconds"], hundred["seconds"]) == (20.0, 200.0)
    assert ten["similarity"] == pytest.approx(0.3) and hundred["similarity"] == pytest.approx(0.6)
    assert ten["imagenet"] == pytest.approx(0.7)
    assert "not measured" in time_rows(results, "x", usual, lambda result: None)[0]["imagenet"]
    assert time_rows(results, "y", usual, lambda result: None) == []
    plot_time(rows, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 10_000


def test_seconds_and_memory_are_those_of_the_device_of_most_cells(subjects):
    from bench.quality.report import main_rows

    scores = dict.fromkeys(("similarity", "top_1", "fidelity", "harmonic", "copying"), 0.5)

    def result(method: str, subject: str, seconds: float, **device: str) -> dict:
        costs = {"training_seconds": seconds, "added_bytes": 0, "seconds_per_image": seconds}
        key = {"method": method, "subject": subject}
        return {"key": key, "scores": scores, "parameters": 1, "file_bytes": 1, **costs, **device}

    results = [result("both", "a", 100.0), result("elsewhere", "a", 100.0)]  # the first cells do not say where
    results += [result("both", subject, 2.0, device="gpu") for subject in "bcd"]
    both, elsewhere = main_rows(results)
    assert both["subjects"] == 4 and both["training s"] == both["s / image"] == 2.0
    assert "training s" not in elsewhere and elsewhere["parameters"] == 1


def test_a_subject_that_few_methods_have_learned_is_compared_but_in_nobodys_mean(subjects):
    from bench.quality.report import judged, main_rows, of_whole_subjects

    def result(method: str, subject: str, harmonic: float) -> dict:
        scores = dict.fromkeys(("similarity", "top_1", "fidelity", "copying"), 0.5) | {"harmonic": harmonic}
        return {"key": {"method": method, "subject": subject}, "scores": scores}

    names = ("base", "textual inversion", "full fine-tune", "ours, clean")
    results = [result(method, "a", 0.5) for method in names]
    results += [result("full fine-tune", "b", 0.9), result("ours, clean", "b", 0.7)]
    rows = main_rows(of_whole_subjects(results))
    assert [row["subjects"] for row in rows] == [1, 1, 1, 1]
    assert {row["harmonic"] for row in rows} == {"0.500 (0.500 to 0.500)"}
    behind = next(row for row in judged(results) if row["against"] == "full fine-tune")
    assert behind["subjects"] == 2 and behind["difference"].startswith("-0.100")
    assert of_whole_subjects(results[1:]) == results[1:], "two of three have learned it"
    assert of_whole_subjects([]) == []


def test_best_rates_are_those_of_the_most_subjects():
    from bench.quality.results import best_rates

    def result(method: str, rates: tuple[float, float], harmonic: float) -> dict:
        return {"key": {"method": method, "rates": list(rates)}, "scores": {"harmonic": harmonic}}

    low, high, once = (1e-4, 2e-3), (1e-3, 2e-3), (1e-2, 2e-3)
    found = [result("ours", low, 0.5), result("ours", low, 0.6), result("ours", high, 0.7), result("ours", high, 0.5)]
    others = [result("ours", once, 0.9), result("LoRA", low, 0.9), result("LoRA", low, 0.9)]
    assert best_rates([*found, *others], "ours") == high
    assert best_rates(found, "LoRA") is None
