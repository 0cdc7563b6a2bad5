# SPDX-License-Identifier: Apache-2.0
"""The table of retained language capability, for the terminal, in Markdown, and as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from megatron_smar.evaluation.language.results import align
from megatron_smar.evaluation.language.retention import Estimate, Retention

NOTE = (
    "Scores and retention in percent, with one standard error: the harness's, carried to means and ratios to first "
    "order (delta method) as if all scores were independent. Before and after answer the same questions, so the errors "
    "of the ratios are too large rather than too small. The retention of the average is mean after / mean before."
)
# Okabe and Ito's colors for color-blind readers, as in this project's other figures.
_COLORS = ("#0072b2", "#d97706", "#009e73", "#cc79a7", "#56b4e9", "#59616d")
_INK = "#1b1f24"

Rows = list[tuple[str, ...]]


def score_rows(table: Retention) -> Rows:
    """Returns the cells of the main table: a row for each task and for the average."""
    rows: Rows = [("task", "before", *(cell for m in table.models for cell in (m.name, "retention")))]

    def row(title: str, before: Estimate, pairs: Sequence[tuple[Estimate, Estimate]]) -> None:
        rows.append((title, before.percent(), *(value.percent() for pair in pairs for value in pair)))

    for task in table.averaged:
        row(table.titles[task], table.before[task], [(m.scores[task], m.ratios[task]) for m in table.models])
    row("average", table.average, [(m.average, m.retention) for m in table.models])
    for task in table.titles:
        if task not in table.averaged:
            title = f"{table.titles[task]} (not averaged)"
            row(title, table.before[task], [(m.scores[task], m.ratios[task]) for m in table.models])
    return rows


def left_out_rows(table: Retention) -> Rows:
    """Returns the cells of the second table: the retention of the average without each single task."""
    several = len(table.models) > 1
    rows: Rows = [("retention without", *(m.name for m in table.models), *(("lead",) if several else ()))]
    for task in (None, *(table.averaged if len(table.averaged) > 1 else ())):
        cells = [(m.retention if task is None else m.without[task]).percent() for m in table.models]
        lead = table.lead(task)
        rows.append(
            ("no task" if task is None else table.titles[task], *cells)
            + ((f"{lead[0]} +{100 * lead[1]:.1f}",) if lead else ())
        )
    return rows


def format_retention(table: Retention) -> str:
    """Returns both tables for the terminal."""
    return f"{align(score_rows(table))}\n\n{align(left_out_rows(table))}\n\n{textwrap.fill(NOTE, 110)}"


def markdown(table: Retention) -> str:
    """Returns both tables in Markdown."""
    main, left_out = (_markdown(rows) for rows in (score_rows(table), left_out_rows(table)))
    return f"{main}\n\nRetention of the average without each single task:\n\n{left_out}\n\n{NOTE}\n"


def _markdown(rows: Rows) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '\\|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]])


def draw(table: Retention) -> Figure:
    """Returns the figure: retention of each task and of the average, a bar for each model, with standard errors."""
    labels = [title if task in table.averaged else f"{title}\n(not averaged)" for task, title in table.titles.items()]
    labels.append("average")
    figure = Figure(figsize=(2 + 1.05 * len(labels), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(table.models)
    for index, model in enumerate(table.models):
        values = [*(model.ratios[task] for task in table.titles), model.retention]
        places = [place + (index - (len(table.models) - 1) / 2) * width for place in range(len(values))]
        errors = [value.stderr or 0.0 for value in values]
        heights = [value.value for value in values]
        color = _COLORS[index % len(_COLORS)]
        axes.bar(places, heights, width, yerr=errors, color=color, label=model.name, ecolor=_INK)
    axes.axhline(1, color=_INK, linewidth=1, linestyle=":")
    axes.axvline(len(labels) - 1.5, color="#dfe2e7", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylabel("score after / score before")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


def write_figure(path: Path, table: Retention) -> None:
    """Draws the figure into a file, of the format that the file's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(table).savefig(path, dpi=144)
