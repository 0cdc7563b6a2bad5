# SPDX-License-Identifier: Apache-2.0
"""The demo's page: the sections of every run's page (`megatron_smar.report.sections`), and before against after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from demo_headline import comparison_rows, headline_rows, inside, paired_rows

from megatron_smar.report import sections
from megatron_smar.report.html import Markup, document, section, table, tag
from megatron_smar.report.numbers import decimal, duration, percent

PHASES = {
    "data": "Data",
    "vision": "Vision encoder",
    "stage0": "Stage 0: reading",
    "stage1": "Stage 1: visual alignment",
    "stage2": "Stage 2: visual instruction tuning",
    "evaluation": "Evaluation",
    "total": "Total",
}
DEFINITIONS = {
    "Before and after": "Before is the start of stage 2, when the language model has met nothing but text (stage 1 "
    "trains the connector alone). After is the end of stage 2. Everything is measured on held-out data.",
    "Word accuracy": "The share of held-out passages whose next word the model completes exactly, given the text "
    "so far.",
    "Retention": "Word accuracy after divided by word accuracy before, as the paper divides benchmark scores (its "
    "Table 2). 100% means that no language ability was lost.",
    "Text perplexity": "The exponential of the mean negative log-likelihood per token of held-out text; lower is "
    "better.",
    "Unigram perplexity": "The same for a guesser that knows only how often each token occurs in the training text: "
    "the bar to beat, for at this level nothing has been learned about the order of words.",
    "Picture questions": "The share of held-out questions about pictures whose answer is exactly the expected one.",
    "Chance": "The accuracy of the best guess without the picture: for each kind of question, the answer that is most "
    "frequent in the training data.",
    **sections.DEFINITIONS,
}


def render(report: Mapping[str, Any]) -> str:
    """Returns the page of a checked report.

    Raises:
        ValueError: An example's image cannot be read.
    """
    before, after = report["expert_share"]["before"], report["expert_share"]["after"]
    return document(
        report["title"],
        [
            _headline(report),
            _comparison(report),
            sections.distances(
                report["history"]["stage2"],
                report["band"],
                report["mrd_distance_by_layer_before"],
                report["mrd_distance_by_layer"],
                "stage 2",
            ),
            sections.experts(*({kind: share[kind] for kind in ("text", "vision")} for share in (before, after))),
            sections.losses(report["history"], PHASES),
            sections.questions(report["vqa_by_kind"], "Accuracy after stage 2"),
            sections.examples(report["examples"]),
            sections.settings(report["config"], _phases(report)),
            section("Commands", *(tag("pre", command) for command in report["commands"])),
            sections.terms(_definitions(report)),
        ],
    )


def _definitions(report: Mapping[str, Any]) -> dict[str, str]:
    terms = DEFINITIONS | dict(report.get("definitions", {}))
    return {term: text for term, text in terms.items() if term != "Band" or report["band"] is not None}


def _headline(report: Mapping[str, Any]) -> Markup:
    rows = headline_rows(report)
    summary = (
        f"The model kept {percent(report['retention'])} of its language ability and answers "
        f"{percent(report['vqa_accuracy'])} of the questions about unseen pictures correctly, where guessing gives "
        f"{percent(report['vqa_chance'])}; the perplexity of unseen text went from "
        f"{decimal(report['text_perplexity_before'])} to {decimal(report['text_perplexity_after'])} "
        f"({decimal(report['unigram_perplexity'])} by token frequencies alone)"
    )
    if report["band"] is None:
        summary += "."
    else:
        ended = inside(report["mrd_distance_by_layer"], *report["band"])
        summary += f", and the routing of {ended} MoE layers ended inside the band."
    shown = table(("", "Before", "After", "Baseline"), rows, "headline")
    return tag("header", tag("h1", report["title"]), tag("p", summary, class_="summary"), shown)


def _comparison(report: Mapping[str, Any]) -> Markup:
    if not report.get("comparison"):
        return Markup()
    header, *rows = comparison_rows(report)
    note = tag("p", "The same measures after stage 2, by --modality-routing.")
    parts = [note, table(header, rows)]
    if report.get("paired"):
        header, *rows = paired_rows(report)
        text = "With minus without, paired over seeds: t intervals, and p values of the exact sign-flip test."
        parts += [tag("p", text), table(header, rows)]
    return section("With and without modality-aware routing", *parts)


def _phases(report: Mapping[str, Any]) -> Markup:
    steps, seconds = report["steps"], report["seconds"]
    rows = [
        (PHASES.get(key, key), f"{steps[key]:,}" if key in steps else "", duration(seconds.get(key)))
        for key in [*seconds, *(stage for stage in steps if stage not in seconds)]
    ]
    return tag("div", tag("h3", "steps and time"), table(("Phase", "Steps", "Time"), rows))
