"""The plots of the quality bench."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from ..report import Row
from .both_judges import REAL
from .results import Result, by_method, harmonics, mean
from .scores import bootstrap

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402

LIKENESS_LABELS = {"similarity": "likeness, our judge", "imagenet": "likeness, ImageNet judge"}


def plot(results: Sequence[Result], path: Path) -> None:
    """Left: identity against prompt fidelity. Right: harmonic mean against file size."""
    methods = by_method(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    sizes: list[float] = []
    for index, (name, subjects) in enumerate(methods.items()):
        colour = f"C{index % 10}"
        marker = "*" if name.startswith("ours") else "x" if name in REAL else "o"
        point = mean(subjects, "fidelity"), mean(subjects, "similarity")
        left.scatter(*point, 90, color=colour, marker=marker, label=name)
        size = next(iter(subjects.values())).get("file_bytes", 0) / 1e6
        if size:
            value, low, high = bootstrap(list(harmonics(subjects).values()))
            beside = size * 1.25 ** sizes.count(size)  # those of one size side by side
            sizes.append(size)
            right.errorbar(beside, value, [[value - low], [high - value]], color=colour, marker=marker, capsize=3)
    left.set(
        xlabel="prompt fidelity",
        ylabel="identity similarity",
        title="Does it look like the subject, and where it was asked?",
    )
    right.set(xscale="log", xlabel="file, MB (fp16)", ylabel="harmonic mean, 95 %", title="Quality for size")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.margins(x=0.1)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_time(rows: list[Row], path: Path) -> None:
    """One curve for each method and judge. Its points are numbers of steps."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (judge, title) in zip(axes, LIKENESS_LABELS.items(), strict=True):
        for index, method in enumerate(methods):
            points = [(row["seconds"], row[judge]) for row in rows if row["method"] == method]
            if all(isinstance(value, float) for _, value in points):
                marker = "*" if method.startswith("ours") else "o"
                axis.plot(*zip(*points, strict=True), color=f"C{index}", marker=marker, label=method)
        axis.set(xlabel="seconds of training", ylabel=title, xscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
