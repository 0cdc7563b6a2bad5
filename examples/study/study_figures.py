# SPDX-License-Identifier: Apache-2.0
"""The study's figures: language retention against picture questions, MRD distance by layer, expert load."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from findings import BASELINE, FRONTIER, Results, summary
from grid import MAIN
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import Interval

from megatron_smar.report.comparison_figures import Panel, distance_panels
from megatron_smar.report.figures import expert_maps_by_run, top_share
from megatron_smar.report.style import INK, MUTED, RUN_COLORS, label_ends, new_figure, styled, write

DISTANCES = (
    ("MRD distance by band (the paper's Figure 2)", "distance_bands", ("smar_05", "smar_10", "smar_15", "smar")),
    ("MRD distance by method (Figure 3)", "distance_methods", ("none", "balance", "smar")),
    (
        "MRD distance with bias and balance (Figure 5)",
        "distance_bias",
        ("smar_15_no_bias", "smar_15", "smar_15_balance"),
    ),
)
LOADS = ("balance", "smar", "smar_05")
MODALITIES = ("text", "vision")
AXES = ("pictures", "retention")  # of the scatter
CLOSE = 0.05  # of retention to that of `none`, in its first panel
OWN_EXPERTS = ("hard", "layer_split", "moiie", "ernie")  # values of --modality-routing
FAMILIES = {  # in the order in which they are drawn
    "no method, another learning rate or share of text": MUTED,
    "a method with all experts for both modalities": RUN_COLORS[0][0],
    "a method with experts of a modality's own": RUN_COLORS[1][0],
    "no method": INK,
}
NAMED = {  # label and the side of the point on which it is
    **{"hard": ("hard", "right"), "ernie": ("ernie", "left"), "layer_split": ("layer_split", "left")},
    **{"hard_6_2": ("hard_6_2", "left"), "moiie": ("moiie", "right")},
    **{"none_lr_0005": ("half the learning rate", "left"), "none_text_20": ("20 % text", "left")},
}


def write_figures(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draws the figures that have results; returns the title and the file's name of each."""
    written = []
    if any(results.arms(MAIN, model) for model in results.grid.models):
        written.append(("Language retention against picture questions, by family of methods", "overview.svg"))
        write(overview(results), folder / written[-1][1])
    for model in results.grid.models:
        if arms := results.arms(MAIN, model):
            written.append((f"Language retention against picture questions, {model} experts", f"scatter_{model}.svg"))
            write(scatter(results, model, arms), folder / written[-1][1])
    for title, name, wanted in DISTANCES:
        if shown := _present(results, wanted):
            written.append((title, f"{name}.svg"))
            write(distances(results, shown), folder / written[-1][1])
    if shown := _present(results, LOADS):
        written.append(("Expert load, mean over seeds (Figure 4)", "loads.svg"))
        write(loads(results, shown), folder / written[-1][1])
    return written


@styled
def scatter(results: Results, model: str, arms: Sequence[str]) -> Figure:
    """Plots language retention over picture questions, each with its interval, a point for each arm.

    A line joins `none` at the learning rates that a panel has. Arms that read another share of text are left out. Where
    some arms keep much less or more than `none`, a second panel has all, and the first those close to `none`.
    """
    shown = [arm for arm in arms if "_text_" not in arm]
    points = {arm: [summary(list(results.values(MAIN, model, arm, name).values())) for name in AXES] for arm in shown}
    shown = [arm for arm in shown if math.isfinite(points[arm][1].mean)]
    kept = points[BASELINE][1].mean if BASELINE in points else statistics.fmean(y.mean for _, y in points.values())
    close = [arm for arm in shown if abs(points[arm][1].mean - kept) <= CLOSE]
    far = [arm for arm in shown if arm not in close]
    figure = new_figure(760, 840 if far else 520)
    upper, *lower = figure.subplots(2 if far else 1, squeeze=False, height_ratios=(5, 3) if far else None)[:, 0]
    _points(upper, points, close, close, rows=30)
    for axes in lower:
        _points(axes, points, shown, [BASELINE, *far], rows=18)
    return figure


@styled
def overview(results: Results) -> Figure:
    """Plots language retention over picture questions by family of methods, a panel for each model."""
    models = [model for model in results.grid.models if results.arms(MAIN, model)]
    figure = new_figure(420 * len(models), 400)
    panels = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    for axes, model in zip(panels, models, strict=True):
        arms = results.arms(MAIN, model)
        for name, color in FAMILIES.items():
            for number, arm in enumerate(arm for arm in arms if _family(results, model, arm) == name):
                x, y = (summary(list(results.values(MAIN, model, arm, axis).values())) for axis in AXES)
                _point(axes, x, y, color, None if number else name)
                if arm in NAMED:
                    text, side = NAMED[arm]
                    place = {"xytext": (3 if side == "left" else -3, 3), "textcoords": "offset points"}
                    axes.annotate(text, (100 * x.mean, 100 * y.mean), ha=side, va="bottom", fontsize=9, **place)
        axes.set(title=f"{model} experts", xlabel="picture questions answered, %")
        axes.grid(True, color=MUTED, alpha=0.2)
    panels[0].set_ylabel("language retention, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _family(results: Results, model: str, arm: str) -> str:
    """Returns the family of an arm, a name in FAMILIES."""
    other, soft, own, none = FAMILIES
    if results.grid.flags_of(model, arm)["modality-routing"] in OWN_EXPERTS:
        return own
    return none if arm == BASELINE else other if arm.startswith(f"{BASELINE}_") else soft


def _point(axes: Axes, x: Interval, y: Interval, color: str, label: str | None = None) -> None:
    """Plots a point in percent, with both its intervals."""
    spans = [np.nan_to_num([[100 * (each.mean - each.low)], [100 * (each.high - each.mean)]]) for each in (x, y)]
    axes.errorbar(
        100 * x.mean, 100 * y.mean, spans[1], spans[0], "o", markersize=4, color=color, linewidth=0.9, label=label
    )


def _points(
    axes: Axes, points: Mapping[str, Sequence[Interval]], arms: Sequence[str], labeled: Sequence[str], rows: int
) -> None:
    """Plots arms (picture questions and retention) in a panel, with the names of some of them, in as many rows."""
    rates = [points[arm] for arm in arms if arm == BASELINE or arm.startswith(FRONTIER)]
    line = 100 * np.array(sorted([x.mean, y.mean] for x, y in rates)).reshape(-1, 2)
    axes.plot(*line.T, color=MUTED, linewidth=0.9, zorder=0)
    labels = []
    colors = {arm: RUN_COLORS[number % len(RUN_COLORS)][0] for number, arm in enumerate(points)}
    for arm in arms:
        (x, y), color = points[arm], colors[arm]
        _point(axes, x, y, color)
        labels += [(100 * x.mean, 100 * y.mean, arm, color)] if arm in labeled else []
    axes.set(xlabel="picture questions answered, %", ylabel="language retention, %")
    axes.grid(True, color=MUTED, alpha=0.2)
    label_ends(axes, labels, rows)


def distances(results: Results, arms: Sequence[str]) -> Figure:
    """Plots the distance by layer, the mean over seeds."""
    curves = {}
    for arm in arms:
        by_seed = [result["after"]["mrd_distance"] for result in results.of_arm(MAIN, "large", arm).values()]
        means = [statistics.fmean(layer) for layer in zip(*by_seed, strict=True)]
        curves[arm] = (list(range(1, len(means) + 1)), means)
    settings = {arm: results.grid.arms[arm] for arm in arms}
    bands = {arm: (own["smar-d-min"], own["smar-d-max"]) for arm, own in settings.items() if "smar-d-min" in own}
    return distance_panels(arms, [Panel("held-out questions", "MRD distance, nats", curves)], bands)


def loads(results: Results, arms: Sequence[str]) -> Figure:
    """Plots each modality's share of token slots by layer and expert, the mean over seeds (of one language model)."""
    runs = {}
    for arm in arms:
        chosen = np.array([r["after"]["expert_load"] for r in results.of_arm(MAIN, "large", arm).values()])
        share = chosen / chosen.sum(axis=-1, keepdims=True)  # [seeds, L, M, E]
        means = share.mean(axis=0)
        runs[arm] = {name: means[:, number] for number, name in enumerate(MODALITIES)}
    return expert_maps_by_run(runs, top_share(*(share for shares in runs.values() for share in shares.values())))


def _present(results: Results, wanted: Sequence[str]) -> list[str]:
    done = results.arms(MAIN, "large")
    return [arm for arm in wanted if arm in done]
