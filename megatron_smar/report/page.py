# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that needs nothing else: inline SVG figures, pictures as data URIs, no script."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from megatron_smar.report import figures
from megatron_smar.report.headline import comparison_rows, decimal, duration, headline_rows, percent

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
    "MRD distance": "The symmetric Kullback-Leibler distance, in nats, between the modality routing distributions of "
    "vision and text tokens in one MoE layer (Eq. 6 to 12). 0 means that both modalities use the experts alike.",
    "Band": "[d_min, d_max] of the SMAR loss (Eq. 13): inside it a distance costs nothing, outside it as much as it is "
    "off.",
    "Expert share": "Of all token slots (tokens times experts per token) of one modality in one layer, the part that "
    "an expert receives. Each row of a heat map sums to 100%.",
}
# Bounds that keep the page small, and the size up to which a picture is enlarged pixel by pixel.
MAX_EXAMPLES = 24
MAX_PICTURE_BYTES = 40_000
MAX_PICTURE_SIDE = 256
PIXEL_ART_SIDE = 128


class Markup(str):
    """Text that is HTML already. `tag` escapes every string that is not."""


def tag(element: str, /, *children: str, **attributes: str) -> Markup:
    """An HTML element; `class_="x"` gives class="x"."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    if element in ("img", "meta"):
        return Markup(f"<{element}{given}>")
    return Markup(f"<{element}{given}>{''.join(map(_safe, children))}</{element}>")


def _safe(text: str) -> str:
    return text if isinstance(text, Markup) else escape(str(text))


def _join(parts: Sequence[Markup] | Iterator[Markup]) -> Markup:
    return Markup("\n".join(parts))


def _section(title: str, *children: Markup) -> Markup:
    return tag("section", tag("h2", title), *children)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], class_: str = "") -> Markup:
    """A table whose first column names the rows, in a box of its own that scrolls where the screen is narrow."""
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    table = tag("table", tag("thead", head) if header else Markup(), tag("tbody", *body))
    return tag("div", table, class_=f"table {class_}".strip())


def _drawing(figure: Figure, name: str, title: str, caption: str) -> Markup:
    drawing = Markup(figures.svg(figure, name, f"{title}. {caption}".strip()))
    return tag("figure", tag("h3", title), drawing, tag("figcaption", caption) if caption else Markup())


def render(report: Mapping[str, Any]) -> str:
    """The page of a checked report. Raises ValueError where an example's picture cannot be read."""
    sections = [
        _headline(report),
        _comparison(report),
        _distances(report),
        _experts(report),
        _losses(report),
        _questions(report),
        _examples(report),
        _settings(report),
        _section("Commands", *(tag("pre", command) for command in report["commands"])),
        _measures(report),
    ]
    head = _join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", report["title"]),
            tag("style", Markup(_colours() + STYLE)),
        ]
    )
    body = tag("body", tag("main", _join([section for section in sections if section])))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'


def _colours() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in figures.PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _headline(report: Mapping[str, Any]) -> Markup:
    rows = headline_rows(report)
    summary = (
        f"The model kept {percent(report['retention'])} of its language ability and answers "
        f"{percent(report['vqa_accuracy'])} of the questions about unseen pictures correctly, where guessing gives "
        f"{percent(report['vqa_chance'])}; the perplexity of unseen text went from "
        f"{decimal(report['text_perplexity_before'])} to {decimal(report['text_perplexity_after'])} "
        f"({decimal(report['unigram_perplexity'])} by token frequencies alone), and the routing of {rows[-1][2]} MoE "
        "layers ended inside the band."
    )
    table = _table(("", "Before", "After", "Baseline"), rows, "headline")
    return tag("header", tag("h1", report["title"]), tag("p", summary, class_="summary"), table)


def _comparison(report: Mapping[str, Any]) -> Markup:
    if not report.get("comparison"):
        return Markup()
    header, *rows = comparison_rows(report)
    note = tag("p", "The same measures after stage 2, by --modality-routing.")
    return _section("With and without modality-aware routing", note, _table(header, rows))


def _distances(report: Mapping[str, Any]) -> Markup:
    history, band = report["history"]["stage2"], report["band"]
    layers = figures.layer_series(history)
    if layers:
        over_time = _drawing(
            figures.mrd_over_training(history, band),
            "mrd-steps",
            "Over stage 2",
            "Distance between the routing of vision and text tokens in training batches, by layer. "
            + _means(max(len(steps) for steps, _ in layers.values())),
        )
    else:
        over_time = tag("p", "The run logged no MRD distance by layer in stage 2 (moe/mrd_distance_layer_N).")
    by_layer = _drawing(
        figures.mrd_by_layer(report["mrd_distance_by_layer_before"], report["mrd_distance_by_layer"], band),
        "mrd-layers",
        "Along the model",
        "The same distance on held-out data, layer by layer, before and after stage 2.",
    )
    note = tag(
        "p", "SMAR wants the distance in the shaded band: far enough apart for experts to specialise, no further."
    )
    return _section("How differently vision and text are routed", note, tag("div", over_time, by_layer, class_="two"))


def _means(points: int) -> str:
    block = figures.block_size(points)
    return f"Each point is the mean of {block} logged values." if block > 1 else ""


def _experts(report: Mapping[str, Any]) -> Markup:
    before, after = report["expert_share"]["before"], report["expert_share"]["after"]
    top = figures.top_share(*(share for when in (before, after) for share in (when["text"], when["vision"])))
    maps = [
        _drawing(
            figures.expert_heat_maps(before[kind], after[kind], top),
            f"experts-{kind}",
            f"{kind.capitalize()} tokens",
            "Share of token slots that each expert receives.",
        )
        for kind in ("text", "vision")
    ]
    sides = {kind: {"before": before[kind], "after": after[kind]} for kind in ("text", "vision")}
    preference = _drawing(
        figures.preference_heat_maps(sides["text"], sides["vision"]),
        "experts-preference",
        "The difference",
        "Blue experts serve text more, orange ones vision.",
    )
    note = tag("p", "All four maps of text and vision tokens have the same scale, so that their shades compare.")
    return _section("Which experts serve which modality", note, tag("div", *maps, preference, class_="three"))


def _losses(report: Mapping[str, Any]) -> Markup:
    drawings = []
    for number, (stage, history) in enumerate(report["history"].items()):
        names = figures.loss_names(history)
        if names:
            caption = _means(max(len(history[name]["steps"]) for name in names))
            drawings.append(_drawing(figures.losses(history), f"loss-{number}", PHASES.get(stage, stage), caption))
    return _section("Losses", tag("div", *drawings, class_="three")) if drawings else Markup()


def _questions(report: Mapping[str, Any]) -> Markup:
    kinds = report["vqa_by_kind"]
    if not kinds:
        return Markup()
    drawing = _drawing(
        figures.accuracy_by_kind(kinds),
        "vqa",
        "Accuracy after stage 2",
        "Bars: the model. Diamonds: guessing, without the picture.",
    )
    rows = [
        (kind, percent(kinds[kind]["accuracy"]), percent(kinds[kind]["chance"]), f"{kinds[kind]['count']:,}")
        for kind in figures.best_first(kinds)
    ]
    table = _table(("Kind", "Accuracy", "Chance", "Questions"), rows)
    return _section("Questions about pictures, by kind", tag("div", drawing, table, class_="two"))


def _examples(report: Mapping[str, Any]) -> Markup:
    examples = report["examples"]
    if not examples:
        return Markup()
    cards = tag("div", *(_example(example) for example in examples[:MAX_EXAMPLES]), class_="cards")
    right = sum(bool(example["correct"]) for example in examples[:MAX_EXAMPLES])
    shown = f"{len(examples[:MAX_EXAMPLES])} of {len(examples)}" if len(examples) > MAX_EXAMPLES else str(len(examples))
    return _section("Examples", tag("p", f"{shown} held-out questions, {right} answered correctly."), cards)


def _example(example: Mapping[str, Any]) -> Markup:
    correct = bool(example["correct"])
    terms = [("Model", example["prediction"] or "(nothing)"), ("Expected", example["answer"])]
    answers = tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in terms))
    verdict = tag("p", "✓ right" if correct else "✗ wrong", class_="verdict")
    text = tag("div", tag("p", example["question"], class_="question"), answers, verdict)
    return tag("article", _picture(example["image"]), text, class_="right" if correct else "wrong")


def _picture(source: bytes | str | Path) -> Markup:
    """An <img> that holds its picture, made smaller where it is large."""
    name = "a picture" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            kind, side = picture.get_format_mimetype(), max(picture.size)
            if len(data) > MAX_PICTURE_BYTES:
                picture.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
                smaller = io.BytesIO()
                picture.convert("RGB").save(smaller, "JPEG", quality=85)
                data, kind = smaller.getvalue(), "image/jpeg"
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"'examples' in the report holds {name}, which cannot be read as an image: {error}."
        ) from error
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=uri, alt="the picture asked about", class_="pixels" if side <= PIXEL_ART_SIDE else "")


def _settings(report: Mapping[str, Any]) -> Markup:
    steps, seconds = report["steps"], report["seconds"]
    phases = [
        (PHASES.get(key, key), f"{steps[key]:,}" if key in steps else "", duration(seconds.get(key)))
        for key in [*seconds, *(stage for stage in steps if stage not in seconds)]
    ]
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in report["config"].items():
        rows = list(_flat(value)) if isinstance(value, Mapping) else [(name, _text(value))]
        groups.setdefault(name if isinstance(value, Mapping) else "general", []).extend(rows)
    tables = [tag("div", tag("h3", "steps and time"), _table(("Phase", "Steps", "Time"), phases))]
    tables += [tag("div", tag("h3", name), _table((), rows, "settings")) for name, rows in groups.items()]
    return _section("Settings", tag("div", *tables, class_="groups"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, list, tuple))
    return json.dumps(value, ensure_ascii=False, default=str) if plain else str(value)


def _measures(report: Mapping[str, Any]) -> Markup:
    terms = DEFINITIONS | dict(report.get("definitions", {}))
    return _section(
        "How the numbers were measured",
        tag("dl", *(tag("div", tag("dt", a), tag("dd", b)) for a, b in terms.items()), class_="terms"),
    )


STYLE = """
*{box-sizing:border-box}
:root{color-scheme:light dark;--panel:color-mix(in srgb,var(--ink) 4%,var(--page))}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.2;margin:0 0 .75rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 .6rem;letter-spacing:-.01em}
h3{font-size:.95rem;margin:0 0 .3rem}
p{margin:0 0 1rem;max-width:46rem}
section{margin-top:3rem}
.summary{font-size:1.12rem;margin-bottom:1.5rem}
.two,.three{display:grid;gap:1.75rem 2rem;align-items:start}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.groups{columns:20rem;column-gap:2.5rem}
.groups>div{break-inside:avoid;padding-bottom:1.5rem}
figure{margin:0;min-width:0;max-width:31rem}
figcaption{font-size:.9rem;line-height:1.45;color:var(--muted);margin-top:.4rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit!important}
@media (prefers-color-scheme:dark){svg image{filter:brightness(1.4)}}
.table{overflow-x:auto;max-width:46rem}
table{border-collapse:collapse;width:100%;font-size:.95rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .7rem;text-align:right;border-bottom:1px solid var(--grid);vertical-align:baseline}
th:first-child,td:first-child{text-align:left;padding-left:0}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:.85rem;font-weight:600;color:var(--muted)}
tbody th{font-weight:400}
.groups td:last-child:not(.settings *){white-space:nowrap}
.headline td:nth-child(3){font-weight:700}
.headline td:nth-child(4){color:var(--muted)}
.settings th{color:var(--muted)}
.settings td{overflow-wrap:anywhere}
.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
article{display:grid;grid-template-columns:7.5rem 1fr;gap:1rem;padding:.8rem;background:var(--panel);
border-radius:.5rem;border:1px solid var(--grid);border-left:.3rem solid var(--text);min-width:0}
article.wrong{border-left:.3rem dashed var(--vision)}
article img{width:100%;border-radius:.25rem;display:block}
img.pixels{image-rendering:pixelated}
article>div{min-width:0;overflow-wrap:anywhere}
.question{font-weight:600;line-height:1.35;margin-bottom:.4rem}
article dl,.verdict{margin:0;font-size:.92rem}
article dl div{display:flex;gap:.5rem}
article dt{color:var(--muted);min-width:4.4rem}
dd{margin:0}
.verdict{margin-top:.35rem;font-weight:700}
.right .verdict{color:var(--text)}
.wrong .verdict{color:var(--vision)}
pre{margin:0 0 .6rem;padding:.7rem .9rem;background:var(--panel);border:1px solid var(--grid);border-radius:.4rem;
white-space:pre-wrap;overflow-wrap:anywhere;font:.85rem/1.5 ui-monospace,Menlo,Consolas,monospace}
.terms{margin:0;display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.terms dt{font-weight:600}
.terms dd{color:var(--muted)}
@media (max-width:34rem){body{font-size:15px}main{padding:1.5rem 1rem 3rem}th,td{padding:.4rem .28rem}
article{grid-template-columns:5.5rem 1fr}table{font-size:.88rem}thead th{font-size:.76rem}}
"""
