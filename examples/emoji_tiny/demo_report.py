# SPDX-License-Identifier: Apache-2.0
"""The report of the demo: report.json for programs, report.html for people, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from demo_headline import MEASURES, format_table
from demo_page import render

from megatron_smar.report.numbers import is_finite, is_number, plain

# Every key of a report with its meaning, which the error message shows if the key is missing.
REQUIRED: dict[str, str] = {
    "title": "the name of the run",
    "routing": "the routing of stage 2",
    "retention": "word accuracy after divided by before",
    "text_perplexity_before": "perplexity of held-out text before stage 2",
    "text_perplexity_after": "perplexity of held-out text after stage 2",
    "unigram_perplexity": "perplexity of held-out text under token frequencies alone",
    "word_accuracy_before": "share of held-out words completed correctly before stage 2",
    "word_accuracy_after": "share of held-out words completed correctly after stage 2",
    "vqa_accuracy": "share of held-out picture questions answered correctly after stage 2",
    "vqa_accuracy_before": "the same before stage 2",
    "vqa_chance": "the same for the best guess without the picture",
    "vqa_by_kind": "{kind: {accuracy, chance, count}}",
    "mrd_distance_by_layer": "one distance per MoE layer, after stage 2",
    "mrd_distance_by_layer_before": "one distance per MoE layer, before stage 2",
    "band": "[d_min, d_max], or null if no band acts",
    "steps": "{stage: number of steps}",
    "seconds": "{phase: seconds}, with total",
    "config": "the settings, nested",
    "commands": "the commands that made the run",
    "history": "{stage: {tag: {steps, values}}}",
    "expert_share": "{before, after: {text, vision: [layers x experts]}}",
    "examples": "[{image, question, answer, prediction, correct}]",
}
_NUMBERS = [
    key
    for key in REQUIRED
    if key.startswith(("retention", "text_", "unigram_", "word_", "vqa_")) and key != "vqa_by_kind"
]
# Required keys of nested mappings; "*" stands for every entry.
_INNER: dict[str, tuple[str, ...]] = {
    "vqa_by_kind.*": ("accuracy", "chance", "count"),
    "seconds": ("total",),
    "history": ("stage2",),
    "history.*.*": ("steps", "values"),
    "expert_share": ("before", "after"),
    "expert_share.*": ("text", "vision"),
    "examples.*": ("image", "question", "answer", "prediction", "correct"),
    "paired": ("seeds", "differences"),
    "paired.differences": tuple(MEASURES),
    "paired.differences.*": ("mean", "low", "high", "p"),
    "comparison.*": ("routing", *MEASURES),
}


def write_report(report: Mapping[str, Any], directory: str | Path) -> tuple[Path, Path]:
    """Writes report.json (without the images; null for values that are not finite) and report.html.

    Args:
        report: The keys of `REQUIRED`. Optional: `comparison`, a list of {routing, retention, vqa_accuracy,
            text_perplexity_after, mrd_distance}; `paired`, {seeds, differences: {measure of the comparison: {mean, low,
            high, p}}}; `definitions`, {term: text}, which adds to those of the page.
        directory: Folder to write to, created if it does not exist.

    Returns:
        The paths of report.json and report.html.

    Raises:
        ValueError: A key is missing, a value has the wrong form, or an image cannot be read.
    """
    check_report(report)
    page = render(report)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    json_path, html_path = directory / "report.json", directory / "report.html"
    examples = [{key: example[key] for key in example if key != "image"} for example in report["examples"]]
    json_path.write_text(
        json.dumps(plain({**report, "examples": examples}), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    html_path.write_text(page, encoding="utf-8")
    return json_path, html_path


def print_table(report: Mapping[str, Any]) -> None:
    """Prints the headline numbers as aligned plain text.

    Raises:
        ValueError: See `write_report`.
    """
    check_report(report)
    print(format_table(report))


def check_report(report: Mapping[str, Any]) -> None:
    """Checks a report.

    Raises:
        ValueError: A key is missing, or a value has the wrong form; the message is one sentence.
    """
    for key, meaning in REQUIRED.items():
        if key not in report:
            raise ValueError(f"The report lacks the key '{key}': add {meaning}.")
    for path, keys in _INNER.items():
        for place, entry in _entries(report, path.split(".")):
            for key in keys:
                if not isinstance(entry, Mapping) or key not in entry:
                    raise ValueError(f"The report lacks the key '{key}' in '{place}': add it.")
    for name, value in _numbers(report):
        if not is_number(value):
            raise ValueError(f"'{name}' in the report is {value!r}: give a number, or NaN for not measured.")
    _check_shapes(report)


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields all values that must be numbers, with their names."""
    yield from ((key, report[key]) for key in _NUMBERS)
    for key in ("mrd_distance_by_layer", "mrd_distance_by_layer_before"):
        yield from ((f"{key}.{layer}", distance) for layer, distance in enumerate(report[key], start=1))
    for key in ("steps", "seconds"):
        yield from ((f"{key}.{name}", value) for name, value in report[key].items())
    for path in ("vqa_by_kind", "comparison"):
        for place, entry in _entries(report, [path, "*"]):
            yield from ((f"{place}.{key}", entry[key]) for key in _INNER[f"{path}.*"] if key != "routing")


def _check_shapes(report: Mapping[str, Any]) -> None:
    band = report["band"]
    if band is not None and (len(band) != 2 or not all(map(is_finite, band)) or not band[0] <= band[1]):
        raise ValueError(f"'band' in the report is {band!r}: give [d_min, d_max] with d_min <= d_max, or null.")
    before, after = len(report["mrd_distance_by_layer_before"]), len(report["mrd_distance_by_layer"])
    if before != after or not after:
        raise ValueError(
            f"The report has MRD distances of {before} layers before and {after} after: give one per MoE layer in both."
        )
    for place, series in _entries(report, ["history", "*", "*"]):
        if len(series["steps"]) != len(series["values"]):
            raise ValueError(
                f"'{place}' in the report has {len(series['steps'])} steps and {len(series['values'])} values: give "
                "one value for each step."
            )
    maps = [report["expert_share"][when][kind] for when in ("before", "after") for kind in ("text", "vision")]
    widths = {len(row) for share in maps for row in share}
    if len(widths) != 1 or 0 in widths or len({len(share) for share in maps}) != 1:
        raise ValueError("'expert_share' in the report is uneven: give four matrices of one shape [layers x experts].")


def _entries(report: Mapping[str, Any], path: Sequence[str], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all values at a path such as history.*.*, with their names."""
    if not path:
        yield place, report
        return
    if path[0] != "*":
        if path[0] in report:
            yield from _entries(report[path[0]], path[1:], f"{place}.{path[0]}".strip("."))
        return
    for key, entry in report.items() if isinstance(report, Mapping) else enumerate(report):
        yield from _entries(entry, path[1:], f"{place}.{key}")
