# SPDX-License-Identifier: Apache-2.0
"""Sections of a run's page, each a function from plain data to HTML; a section without data is empty."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_smar.report import figures
from megatron_smar.report.html import Markup, drawing, picture, section, table, tag
from megatron_smar.report.numbers import is_finite, percent
from megatron_smar.report.style import block_size

DEFINITIONS = {
    "MRD distance": "The symmetric Kullback-Leibler distance, in nats, between the modality routing distributions of "
    "vision and text tokens in one MoE layer (Eq. 6 to 12). 0 means that both modalities use the experts equally.",
    "Band": "[d_min, d_max] of the SMAR loss (Eq. 13): the loss is 0 inside the band and equals the distance to it "
    "outside.",
    "Expert share": "The share of all token slots (tokens times experts per token) of one modality in one layer that "
    "an expert receives. Each row of a heat map sums to 100%.",
}
IN_THE_BAND = "SMAR keeps the distance in the shaded band: large enough for experts to specialize, but no larger."
MAX_EXAMPLES = 24

History = Mapping[str, Any]  # {tag: {"steps", "values"}}


def distances(
    history: History,
    band: Sequence[float] | None,
    before: Sequence[float] | None,
    after: Sequence[float] | None,
    stage: str,
) -> Markup:
    """Shows the MRD distance by layer, over training and along the model.

    Args:
        history: The stage's scalars.
        band: [d_min, d_max], or None if the run has no band.
        before: Distance of each MoE layer on held-out data before the stage; None if it was not measured.
        after: Distance of each MoE layer on held-out data after the stage; None if it was not measured.
        stage: Name of the stage in titles.
    """
    layers = figures.layer_series(history)
    if layers:
        over_time = drawing(
            figures.mrd_over_training(history, band),
            "mrd-steps",
            f"Over {stage}",
            "Distance between the routing of vision and text tokens in training batches, by layer. "
            + means(max(len(steps) for steps, _ in layers.values())),
        )
    else:
        over_time = tag("p", f"The run logged no MRD distance by layer in {stage} (moe/mrd_distance_layer_N).")
    drawings = [over_time]
    if after is not None:
        caption = "The same distance on held-out data, layer by layer"
        caption += f", before and after {stage}." if before is not None else "."
        drawings.append(drawing(figures.mrd_by_layer(before, after, band), "mrd-layers", "Along the model", caption))
    parts = [tag("div", *drawings, class_="two")]
    if band is not None:
        parts.insert(0, tag("p", IN_THE_BAND))
    return section("How differently vision and text are routed", *parts)


def means(points: int) -> str:
    """Returns the caption's sentence on curves that are plotted as means of adjacent points."""
    block = block_size(points)
    return f"Each point is the mean of {block} logged values." if block > 1 else ""


def experts(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Markup:
    """Shows heat maps of the experts' shares by modality.

    Args:
        before: {modality: [layers x experts]} before the stage; None if it was not measured.
        after: {modality: [layers x experts]} after the stage.
    """
    maps = expert_maps(before, after, "experts")
    note = tag("p", "All four maps of text and vision tokens have the same scale, so that they can be compared.")
    return section("Which experts serve which modality", *([note] if before else []), tag("div", *maps, class_="three"))


def expert_maps(before: Mapping[str, Any] | None, after: Mapping[str, Any], name: str) -> list[Markup]:
    """Returns heat maps of the experts' shares by modality, and of their difference.

    Args:
        before: {modality: [layers x experts]} before the stage; left out if a modality was not measured then.
        after: {modality: [layers x experts]} after the stage.
        name: Prefix of the maps' names, unique on the page.
    """
    before = before if before is not None and before.keys() >= after.keys() else None
    moments = [share for share in (before, after) if share is not None]
    top = figures.top_share(*(share for when in moments for share in when.values()))
    maps = [
        drawing(
            figures.expert_heat_maps(before[kind] if before else None, after[kind], top),
            f"{name}-{kind}",
            f"{kind.capitalize()} tokens",
            "Share of token slots that each expert receives.",
        )
        for kind in after
    ]
    if {"text", "vision"} <= after.keys():
        sides = {
            kind: ({"before": before[kind]} if before else {}) | {"after": after[kind]} for kind in ("text", "vision")
        }
        maps.append(
            drawing(
                figures.preference_heat_maps(sides["text"], sides["vision"]),
                f"{name}-preference",
                "The difference",
                "Blue experts receive more text tokens, orange experts more vision tokens.",
            )
        )
    return maps


def losses(histories: Mapping[str, History], titles: Mapping[str, str]) -> Markup:
    """Shows the losses of each stage.

    Args:
        histories: Scalars by stage.
        titles: Titles by stage.
    """
    drawings = []
    for number, (stage, history) in enumerate(histories.items()):
        names = figures.loss_names(history)
        if names:
            caption = means(max(len(history[name]["steps"]) for name in names))
            drawings.append(drawing(figures.losses(history), f"loss-{number}", titles.get(stage, stage), caption))
    return section("Losses", tag("div", *drawings, class_="three")) if drawings else Markup()


def load(history: History, images: Mapping[str, bytes]) -> Markup:
    """Shows the experts' load during training: the largest share of an expert by layer, and the last logged heat maps.

    Args:
        history: The run's scalars.
        images: PNG files by modality, as logged by the monitoring.
    """
    names = sorted({tag_.rpartition("/")[2] for tag_ in history if tag_.startswith("moe/max_load_layer_")})
    drawings = []
    for number, name in enumerate(names):
        pattern = re.compile(rf"moe/max_load_layer_(\d+)/{re.escape(name)}$")
        longest = max(len(steps) for steps, _ in figures.layer_series(history, pattern).values())
        drawings.append(
            drawing(
                figures.layers_over_training(history, pattern, "largest share of one expert"),
                f"load-{number}",
                f"{name.capitalize()} tokens",
                "The largest share of the modality's token slots that one expert of a layer received. "
                + means(longest),
            )
        )
    maps = [
        tag("figure", tag("h3", f"{name.capitalize()} tokens, last interval"), picture(image))
        for name, image in images.items()
    ]
    parts = [tag("div", *part, class_="two") for part in (drawings, maps) if part]
    return section("The experts' load during training", *parts) if parts else Markup()


def questions(kinds: Mapping[str, Mapping[str, float]], title: str) -> Markup:
    """Shows the accuracy by kind of question; kinds without a `chance` have no mark for it."""
    if not kinds:
        return Markup()
    full = {kind: {"chance": float("nan"), **values} for kind, values in kinds.items()}
    known = any(is_finite(values["chance"]) for values in full.values())
    image = drawing(
        figures.accuracy_by_kind(full),
        "vqa",
        title,
        "Bars: the model. Diamonds: guessing without the picture." if known else "",
    )
    rows = [
        (kind, percent(full[kind]["accuracy"]), percent(full[kind]["chance"]), f"{full[kind]['count']:,}")
        for kind in figures.best_first(full)
    ]
    return section(
        "Questions about pictures, by kind",
        tag("div", image, table(("Kind", "Accuracy", "Chance", "Questions"), rows), class_="two"),
    )


def examples(items: Sequence[Mapping[str, Any]]) -> Markup:
    """Shows questions with the model's answers.

    Args:
        items: [{image, question, answer, prediction, correct}]; an image may be None.
    """
    if not items:
        return Markup()
    cards = tag("div", *(_example(item) for item in items[:MAX_EXAMPLES]), class_="cards")
    right = sum(bool(item["correct"]) for item in items[:MAX_EXAMPLES])
    shown = f"{len(items[:MAX_EXAMPLES])} of {len(items)}" if len(items) > MAX_EXAMPLES else str(len(items))
    return section("Examples", tag("p", f"{shown} held-out questions, {right} answered correctly."), cards)


def _example(item: Mapping[str, Any]) -> Markup:
    correct = bool(item["correct"])
    terms = [("Model", item["prediction"] or "(nothing)"), ("Expected", item["answer"])]
    answers = tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in terms))
    verdict = tag("p", "✓ right" if correct else "✗ wrong", class_="verdict")
    text = tag("div", tag("p", item["question"], class_="question"), answers, verdict)
    image = picture(item["image"]) if item["image"] is not None else Markup()
    return tag("article", image, text, class_="right" if correct else "wrong")


def settings(groups: Mapping[str, Any], first: Markup | None = None) -> Markup:
    """Shows settings as tables, one for each group; values that are not in a group are under `general`.

    Args:
        groups: {group: {name: value}} or {name: value}.
        first: A table to show before them.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, value in groups.items():
        rows = list(_flat(value)) if isinstance(value, Mapping) else [(name, _text(value))]
        found.setdefault(name if isinstance(value, Mapping) else "general", []).extend(rows)
    tables = [first] if first is not None else []
    tables += [tag("div", tag("h3", name), table((), rows, "settings")) for name, rows in found.items()]
    return section("Settings", tag("div", *tables, class_="groups")) if tables else Markup()


def _flat(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in group.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, list, tuple))
    return json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)


def terms(definitions: Mapping[str, str]) -> Markup:
    """Shows how the numbers were measured."""
    return section(
        "How the numbers were measured",
        tag("dl", *(tag("div", tag("dt", a), tag("dd", b)) for a, b in definitions.items()), class_="terms"),
    )
