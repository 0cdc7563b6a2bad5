# SPDX-License-Identifier: Apache-2.0
"""The study's figures: language retention against picture questions, MRD distance by layer, expert load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from findings import BASELINE, FRONTIER, Results, summary
from grid import MAIN
from matplotlib.figure import Figure

from megatron_smar.report.comparison_figures import Panel, distance_panels
from megatron_smar.report.figures import expert_maps_by_run, top_share
from megatron_smar.report.style import MUTED, RUN_COLORS, new_figure, styled

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


def write_figures(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draws the figures that have results; returns the title and the file's name of each."""
    written = []
    for model in results.grid.models:
        if arms := results.arms(MAIN, model):
            written.append((f"Language retention against picture questions, {model} experts", f"scatter_{model}.svg"))
            scatter(results, model, arms).savefig(folder / written[-1][1])
    for title, name, wanted in DISTANCES:
        if shown := _present(results, wanted):
            written.append((title, f"{name}.svg"))
            distances(results, shown).savefig(folder / written[-1][1])
    if shown := _present(results, LOADS):
        written.append(("Expert load, mean over seeds (Figure 4)", "loads.svg"))
        loads(results, shown).savefig(folder / written[-1][1])
    return written


@styled
def scatter(results: Results, model: str, arms: Sequence[str]) -> Figure:
    """Plots language retention over picture questions, each with its interval, a point for each arm.

    A line joins `none` at its learning rates. Arms that read another share of text are left out.
    """
    figure = new_figure(760, 520)
    axes = figure.subplots()
    rates = [arm for arm in arms if arm == BASELINE or arm.startswith(FRONTIER)]
    means = [
        [100 * summary(list(results.values(MAIN, model, arm, name).values())).mean for arm in rates] for name in AXES
    ]
    order = np.argsort(means[0])
    axes.plot(*np.array(means)[:, order], color=MUTED, linewidth=0.9, zorder=0)
    for number, arm in enumerate(arm for arm in arms if "_text_" not in arm):
        x, y = (summary(list(results.values(MAIN, model, arm, name).values())) for name in AXES)
        color = RUN_COLORS[number % len(RUN_COLORS)][0]
        spans = [np.nan_to_num([[100 * (each.mean - each.low)], [100 * (each.high - each.mean)]]) for each in (x, y)]
        axes.errorbar(100 * x.mean, 100 * y.mean, spans[1], spans[0], "o", markersize=4, color=color, linewidth=0.9)
        place = (100 * x.mean, 100 * y.mean)
        axes.annotate(arm, place, (4, 3), textcoords="offset points", size=8, color=color)
    axes.set(xlabel="picture questions answered, %", ylabel="language retention, %")
    axes.grid(True, color=MUTED, alpha=0.2)
    return figure


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
