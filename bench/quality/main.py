"""Compare our method with other ways to personalise a model: same subjects, same pictures, scored by a judge.

    python dev.py bench quality                 everything, for hours; resumes where it was stopped
    python dev.py bench quality --part main     one part: rates, choices, main, ablations or time
    python dev.py bench quality --quick         minutes: one subject, few steps and pictures
    python dev.py bench quality --part rates --methods "ours, clean" --rates 1e-4,5e-4    chosen rates
    python dev.py bench quality --share 0/4     a quarter; three more processes with 1/4 to 3/4 do the rest
    python dev.py bench quality --network FOLDER --part choices    on the NextDiT that demo.base.train_nextdit trained
    python dev.py bench quality --report        tables and plots of what has been measured so far

Each result is stored at once in bench/results/quality/results.jsonl. The judge was trained on real scenes only. Train
it first: python -m demo.base.judge train.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..host import CACHE, start_host, use_demo
from ..report import device_slug, print_json
from .arguments import SWEPT_WITH, arguments, results_folder
from .results import Result, ResultStore, best_rates

log = logging.getLogger("quality")

SWEEP_SUBJECTS = {"cpu": 2, "cuda": 3}
TABLE_SUBJECTS = {"cpu": 12, "cuda": 40}  # no more than subjects.py keeps for it
CHOICE_SUBJECTS = {"cpu": 3, "cuda": 12}
ABLATION_SUBJECTS = {"cpu": 6, "cuda": 20}
PICTURES = 4  # of every prompt; rates, ablations and time draw one
BYSTANDERS = 25
SWEEP_PROMPTS = 25
LOGGED = ("similarity", "fidelity", "harmonic", "top_1")


def main() -> None:
    options = arguments(__doc__)
    host = start_host("pytorch")
    use_demo()
    log.setLevel(logging.INFO)
    folder = results_folder(options)
    results = ResultStore(folder / "results.jsonl")
    bench = Bench(host, options, results)
    if not options.report:
        for part in options.part:
            getattr(bench, part)()
    from .report import report

    bench.judge_again()
    everyones = ResultStore(folder / "results.jsonl")  # read again: other processes may have added results
    print_json(report(everyones, folder, bench.base, bench.settings, options.quick, bench.second.said_of))


class Bench:
    """Fills the results. Each part asks for those it needs."""

    def __init__(self, host: Any, options: argparse.Namespace, results: ResultStore) -> None:
        from demo.base.judge import Judge

        from .learn import Models
        from .second_judge import SecondJudge
        from .subjects import Settings

        if options.network is None:
            from .unet import unet_models

            model, clip, vae, self.base = unet_models()
        else:
            from .transformers import nextdit_models

            model, clip, vae, self.base = nextdit_models(options.network)
        self.numbers = itertools.count()
        self.host, self.options, self.results = host, options, results
        self.models = Models(model, clip, vae, getattr(torch, options.dtype))
        self.judge = Judge()
        folder = results_folder(options)
        self.second = SecondJudge(folder, CACHE / "quality" / "drawn")
        self.settings = Settings(
            options.steps, options.batch, options.sampler_steps, options.cfg, options.sampler, options.scheduler
        )
        self.kind = "cuda" if torch.cuda.is_available() else "cpu"

    def rates(self) -> None:
        """Every method at each of its rates, on separate subjects, in any precision."""
        from .report import results_of
        from .subjects import make_subject, sweep_artworks

        known = {
            (result["key"]["method"], result["key"]["subject"], tuple(result["key"]["rates"]))
            for result in results_of(self.results, "rates", self.base, self.settings)
        }
        for artwork in sweep_artworks()[: 1 if self.options.quick else SWEEP_SUBJECTS[self.kind]]:
            for name, method in self.methods().items():
                swept = method.rates if len(method.rates) > 1 else ()
                for rates in self.options.rates or swept:
                    if (name, artwork.word, rates) in known:
                        continue
                    subject = make_subject(artwork, prompts=2 if self.options.quick else SWEEP_PROMPTS)
                    self.result("rates", name, rates, method.train, subject, pictures=1, base_objects=0)

    def main(self) -> None:
        """The table: every method at its best rate, all prompts, all seeds. Done subject by subject, so that an
        interrupted run has compared all methods on fewer subjects.
        """
        from .subjects import make_subject, table_artworks

        count = self.options.subjects or TABLE_SUBJECTS[self.kind]
        for artwork in table_artworks(count):
            subject = make_subject(artwork, prompts=2 if self.options.quick else 25)
            self.ceiling(subject)
            for name, method in self.methods().items():
                rates = self.best_rates(method.swept_as or name)
                pictures, base_objects = (1, 2) if self.options.quick else (PICTURES, BYSTANDERS)
                self.result("main", name, rates, method.train, subject, pictures, base_objects)

    def choices(self) -> None:
        """The ablations on subjects of no table: defaults are chosen by these, and the tables' subjects stay unseen.

        With all pictures, because the spread of one per prompt is larger than the differences between settings.
        """
        from .subjects import choice_artworks

        count = self.options.subjects or CHOICE_SUBJECTS[self.kind]
        self.changed("choices", choice_artworks(count), PICTURES)

    def ablations(self) -> None:
        """Our method with one thing changed, on fewer subjects and with one seed."""
        from .subjects import table_artworks

        count = self.options.subjects or ABLATION_SUBJECTS[self.kind]
        self.changed("ablations", table_artworks(count), pictures=1)

    def time(self) -> None:
        """Every method after more and more steps: when does it look like the subject?"""
        from .over_time import measure

        measure(self)

    def changed(self, part: str, artworks: list[Any], pictures: int) -> None:
        """Every ablation on these subjects, at the strength of the training, as results of the part."""
        ablations, as_changed = self.ablations_of_network()
        from .methods import TRAINED_STRENGTH
        from .subjects import make_subject

        rates = self.best_rates("ours, clean")
        for artwork in artworks[: 1 if self.options.quick else None]:
            subject = make_subject(artwork, prompts=2 if self.options.quick else 25)
            for name, train in ablations.items():
                if self.options.ablations and name not in self.options.ablations:
                    continue
                with as_changed(name):
                    count = 1 if self.options.quick else pictures
                    self.result(part, name, rates, train, subject, count, base_objects=0, strength=TRAINED_STRENGTH)

    def methods(self) -> dict[str, Any]:
        known = self.known_methods()
        wanted = self.options.methods or list(known)
        return {name: known[name] for name in wanted}

    def known_methods(self) -> dict[str, Any]:
        from . import methods

        if self.options.network is None:
            return methods.METHODS
        from . import transformers

        return transformers.METHODS

    def ablations_of_network(self) -> tuple[dict[str, Callable[..., Any]], Callable[[str], Any]]:
        """The changes by their names, and what puts one in place."""
        from . import ablations

        if self.options.network is None:
            return ablations.ABLATIONS, ablations.as_changed
        from . import transformers

        network = self.models.model.model.diffusion_model
        return transformers.CHOICES, partial(transformers.as_changed, network=network)

    def best_rates(self, name: str) -> tuple[float, float]:
        """The best pair of the sweep. The middle one if there are no results.

        For a sampler without a sweep, the result of another sampler with the same training is used.
        """
        from .report import results_of

        swept = results_of(self.results, "rates", self.base, self.settings) or results_of(
            self.results, "rates", self.base, self.settings._replace(**SWEPT_WITH)
        )
        rates = self.known_methods()[name].rates
        return best_rates(swept, name) or rates[len(rates) // 2]

    def result(
        self,
        part: str,
        name: str,
        rates: tuple[float, float],
        train: Callable[..., Any],
        subject: Any,
        pictures: int,
        base_objects: int,
        strength: float | None = None,
    ) -> Result | None:
        """Train, draw and score, unless the result is known or another process's."""
        from .drawing import draw
        from .methods import timed
        from .report_pictures import keep_pictures
        from .scores import base_fidelity, score
        from .subjects import base_object_scenes, texts_of
        from .task import Method, TrainingTask
        from .validation_loss import unseen_loss

        key = self.key(part, name, subject, rates=list(rates), pictures=pictures, prompts=len(subject.prompts))
        known, is_ours = self.results.find(key), self.is_ours()
        if known is not None or not is_ours:
            return known
        start = time.perf_counter()
        task = TrainingTask(self.host, self.models, subject, self.settings, *rates, strength=strength)
        trained, seconds, memory = timed(task, Method(train))
        began = time.perf_counter()
        images = draw(task, trained, subject.prompt_texts(trained.words), pictures)
        per_image = (time.perf_counter() - began) / len(images)
        asked = [scene for scene in subject.prompts for _ in range(pictures)]
        value: Result = {
            "device": device_slug(),
            "scores": score(self.judge, subject, images, asked)._asdict(),
            "parameters": trained.parameters,
            "file_bytes": trained.file_bytes,
            "training_seconds": round(seconds, 2),
            "added_bytes": memory,
            "seconds_per_image": round(per_image, 3),
            "unseen_loss": [round(loss, 6) for loss in unseen_loss(task, trained)],
        }
        if base_objects:
            scenes = base_object_scenes(base_objects)
            value["base_fidelity"] = base_fidelity(self.judge, draw(task, trained, texts_of(scenes, None), 1), scenes)
        keep_pictures(part, name, subject.artwork.word, images[::pictures])
        if part in ("main", "time"):
            self.second.add(key, images, asked)
        said = ", ".join(f"{kind} {value['scores'][kind]:.3f}" for kind in LOGGED)
        took = time.perf_counter() - start
        log.info("%s, %s %s, %s: %s; %.0f s", part, name, rates, subject.artwork.word, said, took)
        return self.results.add(key, value)

    def is_ours(self) -> bool:
        """Whether the next result belongs to this process. Known results count too, so all processes count alike."""
        own, count = self.options.share
        return next(self.numbers) % count == own

    def ceiling(self, subject: Any) -> None:
        """Real scenes of the prompts: as they are, after the autoencoder, and with the object moved a little."""
        from demo.base.scenes import render

        from .both_judges import CEILING
        from .drawing import autoencoded
        from .report_pictures import keep_pictures
        from .scores import score
        from .subjects import moved

        real = [render(scene) for scene in subject.prompts]
        others = [render(scene) for scene in moved(subject.prompts)]
        coded = autoencoded(self.host, self.models.vae, real)
        for name, images in (("real scenes", real), ("real, autoencoded", coded), (CEILING, others)):
            key = self.key("main", name, subject, prompts=len(subject.prompts))
            if self.is_ours() and self.results.find(key) is None:
                keep_pictures("main", name, subject.artwork.word, images)
                self.second.add(key, images, subject.prompts)
                self.results.add(key, {"scores": score(self.judge, subject, images, subject.prompts)._asdict()})

    def judge_again(self) -> None:
        """The second judge on stored pictures that it has not scored. Nothing is trained or drawn."""
        from demo.base.artwork import find

        from .report import results_of
        from .subjects import make_subject

        for result in results_of(self.results, "main", self.base, self.settings):
            if self.second.said_of(result) is None and self.second.file(result["key"]).exists():
                prompts = make_subject(find(result["key"]["subject"]), prompts=result["key"]["prompts"]).prompts
                pictures = result["key"].get("pictures", 1)
                self.second.judge_kept(result, [scene for scene in prompts for _ in range(pictures)])

    def key(self, part: str, method: str, subject: Any, **more: Any) -> Result:
        return {
            "part": part,
            "method": method,
            "subject": subject.artwork.word,
            "settings": self.settings._asdict(),
            "dtype": self.options.dtype,
            "base": self.base,
            **more,
        }
