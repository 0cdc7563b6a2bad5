# SPDX-License-Identifier: Apache-2.0
"""The demo's headline numbers: the table shown on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_smar.report.numbers import aligned, decimal, duration, is_finite, percent

QUESTIONS = "Picture questions"
MEASURES = {
    "retention": ("Retention", percent),
    "text_perplexity_after": ("Text perplexity", decimal),
    "vqa_accuracy": (QUESTIONS, percent),
    "mrd_distance": ("MRD distance", decimal),
}


def headline_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the headline table: measure, before, after, baseline; a band only where one acts."""
    before, after = report["mrd_distance_by_layer_before"], report["mrd_distance_by_layer"]
    band = report["band"]
    ends = "" if band is None else f"{band[0]:g} to {band[1]:g} band"

    def row(name: str, form: Any, key_before: str, key_after: str, baseline: str) -> tuple[str, str, str, str]:
        return name, form(report[key_before]), form(report[key_after]), baseline

    unigram = f"{decimal(report['unigram_perplexity'])} unigram"
    chance = f"{percent(report['vqa_chance'])} chance"
    rows = [
        ("Retention of language", "", percent(report["retention"]), "100% nothing lost"),
        row("Word accuracy", percent, "word_accuracy_before", "word_accuracy_after", ""),
        row("Text perplexity", decimal, "text_perplexity_before", "text_perplexity_after", unigram),
        row(QUESTIONS, percent, "vqa_accuracy_before", "vqa_accuracy", chance),
        ("MRD distance, mean of layers", _mean(before), _mean(after), ends),
    ]
    if band is not None:
        rows.append(("Layers inside the band", inside(before, *band), inside(after, *band), ""))
    return rows


def format_table(report: Mapping[str, Any]) -> str:
    """Returns the headline table of a checked report as aligned plain text."""
    rows = [("", "before", "after", "baseline"), *headline_rows(report)]
    kinds = [row[0] for row in rows].index(QUESTIONS) + 1
    rows[kinds:kinds] = [
        (f"  {kind} ({row['count']:,})", "", percent(row["accuracy"]), f"{percent(row['chance'])} chance")
        for kind, row in report["vqa_by_kind"].items()
    ]
    lines = aligned(rows, left=(0, 3))
    if report.get("comparison"):
        lines += ["", *aligned(comparison_rows(report), left=(0,))]
    if report.get("paired"):
        lines += ["", *aligned(paired_rows(report), left=(0,))]
    steps = ", ".join(f"{stage} {count:,}" for stage, count in report["steps"].items())
    return "\n".join([report["title"], "", *lines, "", f"steps: {steps}; time: {duration(report['seconds']['total'])}"])


def comparison_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the measures after stage 2 by --modality-routing, with a header, of a report with a `comparison`."""
    header = ("Routing", *(name for name, _ in MEASURES.values()))
    rows = ((run["routing"], *(form(run[key]) for key, (_, form) in MEASURES.items())) for run in report["comparison"])
    return [header, *rows]


def paired_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the paired differences over seeds, with a header, of a report with a `paired`."""
    found = report["paired"]
    rows: list[tuple[str, ...]] = [(f"Difference, {found['seeds']} seeds", "mean", "95% interval", "p")]
    for key, (name, form) in MEASURES.items():
        entry = found["differences"][key]
        ends = f"{form(entry['low'])} to {form(entry['high'])}" if is_finite(entry["low"]) else "-"
        rows.append((name, form(entry["mean"]), ends, f"{entry['p']:.3f}"))
    return rows


def _mean(values: Sequence[float | None]) -> str:
    finite = [value for value in values if is_finite(value)]
    return decimal(sum(finite) / len(finite) if finite else None)


def inside(distances: Sequence[float | None], d_min: float, d_max: float) -> str:
    """Returns how many layers' distances are in the band, in words."""
    return f"{sum(is_finite(d) and d_min <= d <= d_max for d in distances)} of {len(distances)}"
