# SPDX-License-Identifier: Apache-2.0
"""The page of a plan: the best layouts in a table, memory and time by part as stacked bars, the flags to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from megatron_smar.planning.cluster import GIB
from megatron_smar.planning.search import Plan, Request
from megatron_smar.report import style
from megatron_smar.report.html import Markup, document, drawing, join, section, table, tag

TITLES = ("layout", "s per step", "tokens/s/GPU", "TFLOP/s/GPU", "GiB", "why")


def page(request: Request, plans: Sequence[Plan]) -> str:
    """Returns the page as HTML.

    Args:
        request: What was planned.
        plans: The layouts, best first.
    """
    best, cluster, batch = plans[0], request.cluster, request.batch
    heading = f"{request.shape.size / 1e9:.1f} billion parameters on {request.gpus} {cluster.name}"
    summary = (
        f"{best.layout}: {best.tokens:,.0f} tokens per second and GPU, {best.memory.device / GIB:.0f} of "
        f"{cluster.memory:.0f} GiB. Computed, not measured."
        if best.fits
        else f"No layout fits in {cluster.memory:.0f} GiB; the smallest needs {best.memory.device / GIB:.0f}."
    )
    step = (
        f"A step has {batch.rows:,} rows of {batch.sequence:,} positions, {100 * batch.filled:.0f} % of them filled, "
        f"with {batch.tiles:g} tiles on average and {batch.most_tiles:g} at most; the fullest experts get "
        f"{request.imbalance:g} times an even share."
    )
    head = join([tag("h1", heading), tag("p", summary, class_="summary"), tag("p", step)])
    charts = tag("div", _memory_chart(request, plans), _time_chart(plans), class_="two")
    flags = " ".join(best.layout.flags(request.shape, batch))
    return document(
        heading,
        [
            head,
            section("The best layouts", table(TITLES, [row_of(plan) for plan in plans])),
            section("Where memory and time go", charts),
            section("Flags", tag("p", "Of the first layout, for pretrain_vlm.py:"), tag("pre", tag("code", flags))),
        ],
    )


def row_of(plan: Plan) -> tuple[str, ...]:
    """Returns a layout's row under `TITLES`."""
    numbers = (f"{plan.seconds:.2f}", f"{plan.tokens:,.0f}", f"{plan.tflops:.0f}", f"{plan.memory.device / GIB:.1f}")
    return str(plan.layout), *numbers, plan.reason


def _memory_chart(request: Request, plans: Sequence[Plan]) -> Markup:
    bars = [{name: size / GIB for name, size in plan.memory.by_part().items()} for plan in plans]
    figure = stacked(bars, "GiB on the fullest GPU", limit=request.cluster.memory)
    caption = "Of the pipeline stage with most; the line is the GPU's memory, communication buffers come on top."
    return drawing(figure, "memory", "Memory by part", caption)


def _time_chart(plans: Sequence[Plan]) -> Markup:
    figure = stacked([plan.duration.by_part() for plan in plans], "seconds per step")
    return drawing(figure, "time", "Time by part", "Of the slowest pipeline stage; layouts in the order of the table.")


def stacked(bars: Sequence[Mapping[str, float]], label: str, limit: float | None = None) -> Figure:
    """Returns horizontal bars, best on top, whose segments are the parts that matter somewhere.

    Args:
        bars: For each layout the size of its parts, which have the same names.
        label: What the sizes are.
        limit: Where to draw a line.
    """
    largest = max(sum(bar.values()) for bar in bars)
    names = [name for name in bars[0] if any(bar[name] > largest / 200 for bar in bars)]
    figure = style.new_figure(460, 110 + 24 * len(bars))
    axes = figure.subplots()
    starts = [0.0] * len(bars)
    for number, name in enumerate(names):
        sizes = [max(0.0, bar[name]) for bar in bars]
        color = style.RUN_COLORS[number % len(style.RUN_COLORS)][0]
        axes.barh(range(len(bars)), sizes, left=starts, color=color, label=name, edgecolor=style.PAGE, linewidth=0.5)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    if limit is not None:
        axes.axvline(limit, color=style.MUTED, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(bars)), [str(number + 1) for number in range(len(bars))])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure
