# SPDX-License-Identifier: Apache-2.0
"""Sections and figures of a comparison of runs; a section in which no run has data is empty."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from megatron_smar.report.benchmarks import UNITS, skipped
from megatron_smar.report.comparison_figures import Band, Panel, distance_panels, training_panels
from megatron_smar.report.figures import expert_maps_by_run, top_share
from megatron_smar.report.html import Markup, drawing, join, section, table, tag
from megatron_smar.report.results import Results, Routing
from megatron_smar.report.run import Run
from megatron_smar.report.scores import Column, columns
from megatron_smar.report.sections import IN_THE_BAND, means

TRAINING = ("lm loss", "mrd distance")


def results(runs: Sequence[Run]) -> dict[str, Results]:
    """Returns the results of evaluate.py by name of the run; a run without results is left out."""
    return {run.name: run.after for run in runs if run.after is not None}


def _routings(runs: Sequence[Run]) -> dict[str, dict[str, Routing]]:
    """Returns the routings by title of the questions and name of the run."""
    found: dict[str, dict[str, Routing]] = {}
    for name, measured in results(runs).items():
        for title, routing in measured.routings.items():
            found.setdefault(title, {})[name] = routing
    return found


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _bands(runs: Sequence[Run]) -> dict[str, Band]:
    return {run.name: run.band for run in runs if run.band is not None}


def scores(runs: Sequence[Run]) -> Markup:
    """Shows the scores on benchmarks and tasks, a row for each run and the best of each column in bold."""
    found = columns(results(runs))
    parts = [_score_table(runs, found)] if found else []
    parts += [shown for shown in [skipped(results(runs))] if shown]
    return section("Scores", *parts) if parts else Markup()


def _score_table(runs: Sequence[Run], found: Sequence[Column]) -> Markup:
    rows = [
        [tag("strong", column.cell(name)) if name in column.best else column.cell(name) for column in found]
        for name in _names(runs)
    ]
    named = [(name, *row) for name, row in zip(_names(runs), rows, strict=True)]
    shown = table(("Run", *(column.title for column in found)), named)
    return join([tag("p", UNITS), shown, *_paragraphs([*_uneven(found), *_unscored(runs, found)])])


def distances(runs: Sequence[Run]) -> Markup:
    """Shows the MRD distance by layer, a panel for each set of questions."""
    panels = _distance_panels(runs)
    if not panels:
        return Markup()
    bands = _bands(runs)
    drawings = [
        drawing(
            distance_panels(_names(runs), [panel._replace(title="")], bands),
            f"mrd-{number}",
            panel.title,
            _only(runs, panel.curves),
        )
        for number, panel in enumerate(panels)
    ]
    said = [*([IN_THE_BAND] if bands else []), *_sizes(runs, 0)]
    said += _lacking(runs, {name for panel in panels for name in panel.curves}, "distances by layer")
    return section("MRD distance by layer", *_paragraphs(said), tag("div", *drawings, class_="two"))


def _distance_panels(runs: Sequence[Run]) -> list[Panel]:
    panels = []
    for title, routings in _routings(runs).items():
        curves = {
            name: (list(routing.distances), list(routing.distances.values()))
            for name, routing in routings.items()
            if routing.distances
        }
        if curves:
            panels.append(Panel(title, "MRD distance (nats)", curves))
    return panels


def experts(runs: Sequence[Run]) -> Markup:
    """Shows heat maps of the experts' shares, a row for each run."""
    maps = _expert_maps(runs)
    if not maps:
        return Markup()
    drawings = [
        drawing(figure, f"experts-{number}", title, _only(runs, names))
        for number, (title, names, figure) in enumerate(maps)
    ]
    shown = {name for _, names, _ in maps for name in names}
    said = ["All maps have the same scale.", *_sizes(runs, 1), *_lacking(runs, shown, "shares of experts")]
    return section("Which experts serve which modality", *_paragraphs(said), tag("div", *drawings, class_="two"))


def _expert_maps(runs: Sequence[Run]) -> list[tuple[str, list[str], Figure]]:
    """Returns the title, the runs and the figure of each set of questions; all figures have one scale."""
    found = {
        title: {name: routing.shares for name, routing in routings.items() if routing.shares}
        for title, routings in _routings(runs).items()
    }
    every = [share for runs_ in found.values() for shares in runs_.values() for share in shares.values()]
    top = top_share(*map(np.ravel, every)) if every else 1.0
    return [(title, list(shares), expert_maps_by_run(shares, top)) for title, shares in found.items() if shares]


def training(runs: Sequence[Run]) -> Markup:
    """Shows the loss and the mean distance of the runs over their steps."""
    panels = _training_panels(runs)
    if not panels:
        return Markup()
    drawings = []
    for number, panel in enumerate(panels):
        points = max(len(steps) for steps, _ in panel.curves.values())
        caption = " ".join(filter(None, [means(points), _only(runs, panel.curves)]))
        drawings.append(drawing(training_panels(_names(runs), [panel]), f"training-{number}", panel.label, caption))
    said = _lacking(runs, {name for panel in panels for name in panel.curves}, "logged scalars")
    return section("Training", *_paragraphs(said), tag("div", *drawings, class_="two"))


def _training_panels(runs: Sequence[Run]) -> list[Panel]:
    panels = [
        Panel("", name, {run.name: run.scalars[name] for run in runs if name in run.scalars}) for name in TRAINING
    ]
    return [panel for panel in panels if panel.curves]


def files(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Yields each figure that is written as a file, with the file's name without suffix."""
    if panels := _distance_panels(runs):
        yield "mrd_distance", distance_panels(_names(runs), panels, _bands(runs))
    for title, _, figure in _expert_maps(runs):
        yield f"experts_{re.sub(r'\W+', '_', title.lower())}", figure
    if panels := _training_panels(runs):
        yield "training", training_panels(_names(runs), panels)


def notes(runs: Sequence[Run]) -> list[str]:
    """Returns what a reader of the scores and figures must know, in sentences."""
    found = columns(results(runs))
    return [*_uneven(found), *_sizes(runs, 0), *_sizes(runs, 1), *(_unscored(runs, found) if found else [])]


def _uneven(found: Sequence[Column]) -> list[str]:
    """Returns a sentence for each column whose runs answered different numbers of questions."""
    return [
        f"{column.title}: the runs answered different numbers of questions, and the best is not marked "
        f"({', '.join(f'{name} {score.questions:,}' for name, score in column.scores.items())})."
        for column in found
        if not column.is_comparable
    ]


def _unscored(runs: Sequence[Run], found: Sequence[Column]) -> list[str]:
    return _lacking(runs, {name for column in found for name in column.scores}, "scores on benchmarks or tasks")


def _sizes(runs: Sequence[Run], which: int) -> list[str]:
    """Returns a sentence if the runs have different numbers of MoE layers (`which` = 0) or of experts (1)."""
    found: dict[str, int] = {}
    for routings in _routings(runs).values():
        for name, routing in routings.items():
            if routing.size[which]:
                found.setdefault(name, routing.size[which])
    if len(set(found.values())) <= 1:
        return []
    part, shown = (
        ("MoE layers", "each curve ends at its run's last layer"),
        ("experts", "each map has as many columns as its run has experts"),
    )[which]
    counts = ", ".join(f"{name} {count}" for name, count in found.items())
    return [f"The runs have different numbers of {part} ({counts}); {shown}."]


def _lacking(runs: Sequence[Run], have: Collection[str], what: str) -> list[str]:
    without = [run.name for run in runs if run.name not in have]
    return [f"Without {what}: {', '.join(without)}."] if without else []


def _only(runs: Sequence[Run], have: Collection[str]) -> str:
    """Returns the caption of a figure that some of the runs are not in."""
    return " ".join(_lacking(runs, have, "data here"))


def _paragraphs(said: Sequence[str]) -> list[Markup]:
    return [tag("p", text) for text in said]
