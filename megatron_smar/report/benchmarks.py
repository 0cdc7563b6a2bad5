# SPDX-License-Identifier: Apache-2.0
"""The section of a run's page on benchmarks and tasks: scores, skipped samples, and the routing on each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_smar.report import figures
from megatron_smar.report.html import Markup, drawing, join, section, table, tag
from megatron_smar.report.numbers import decimal
from megatron_smar.report.results import Benchmark, Results, Routing
from megatron_smar.report.scores import columns
from megatron_smar.report.sections import expert_maps

UNITS = (
    "Scores of multimodal benchmarks are in percent, MME's are its points; those of language tasks are in the units of "
    "the lm-evaluation-harness, with their standard errors."
)


def benchmarks(before: Results | None, after: Results | None, band: Sequence[float] | None) -> Markup:
    """Shows the results on benchmarks and tasks; empty if there are none.

    Args:
        before: Results before the run; None if there are none.
        after: Results after the run; None if there are none.
        band: [d_min, d_max], or None if the run has no band.
    """
    results = {when: found for when, found in (("before", before), ("after", after)) if found}
    entries = {when: found.benchmarks for when, found in results.items()}
    parts = [_scores(results), skipped({when: found for when, found in results.items() if found.benchmarks})]
    names = dict.fromkeys(name for found in entries.values() for name in found)
    for number, name in enumerate(names):
        measured = {when: found[name] for when, found in entries.items() if name in found}
        parts.append(_benchmark(measured, band, f"benchmark-{number}"))
    return section("Benchmarks", *parts) if any(parts) else Markup()


def _scores(results: Mapping[str, Results]) -> Markup:
    rows = [(column.title, *(column.cell(when) for when in results)) for column in columns(results)]
    if not rows:
        return Markup()
    return join([tag("p", UNITS), table(("Benchmark", *(when.capitalize() for when in results)), rows)])


def skipped(results: Mapping[str, Results]) -> Markup:
    """Shows how many samples of each benchmark were asked and skipped, and why.

    Args:
        results: Results by name of the run, or of the moment.
    """
    entries = [(name, entry) for name, found in results.items() for entry in found.benchmarks.values()]
    if not entries:
        return Markup()
    rows = [
        (
            f"{entry.title}, {name}" if len(results) > 1 else entry.title,
            f"{entry.asked:,}",
            f"{sum(entry.skipped.values()):,}",
            _reasons(entry),
        )
        for name, entry in entries
    ]
    return table(("Questions", "Asked", "Skipped", "Reasons"), rows)


def _reasons(entry: Benchmark) -> str:
    counts = sorted(entry.skipped.items(), key=lambda item: -item[1])
    return "; ".join(f"{reason} ({count:,})" for reason, count in counts)


def _benchmark(measured: Mapping[str, Benchmark], band: Sequence[float] | None, name: str) -> Markup:
    """Shows one benchmark: its metrics and its routing, before and after the run."""
    last = list(measured.values())[-1]
    metrics = dict.fromkeys(metric for entry in measured.values() for metric in entry.metrics)
    rows = [(metric, *(decimal(entry.metrics.get(metric)) for entry in measured.values())) for metric in metrics]
    header = ("Metric", *(when.capitalize() for when in measured))
    parts = [table(header, rows)] if rows else [tag("p", "Not scored here: the reference answers are not published.")]
    routings = {when: entry.routing for when, entry in measured.items()}
    parts += _routing(routings.get("before"), routings.get("after"), band, name)
    version = f" ({last.version})" if last.version else ""
    return tag("div", tag("h3", f"{last.title}{version}"), tag("div", *parts, class_="three"), class_="benchmark")


def _routing(before: Routing | None, after: Routing | None, band: Sequence[float] | None, name: str) -> list[Markup]:
    if after is None:
        return []
    parts = []
    if after.distances:
        earlier = list(before.distances.values()) if before and before.distances else None
        image = figures.mrd_by_layer(earlier, list(after.distances.values()), band)
        parts.append(drawing(image, f"{name}-mrd", "MRD distance by layer", "Over all questions of the benchmark."))
    if after.shares:
        parts += expert_maps(before.shares if before else None, after.shares, name)
    return parts
