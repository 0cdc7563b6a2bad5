# SPDX-License-Identifier: Apache-2.0
"""A self-contained HTML page: inline SVG figures, images as data URIs, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, UnidentifiedImageError

from megatron_smar.report import style

MAX_PICTURE_BYTES = 40_000
MAX_PICTURE_SIDE = 256
PIXEL_ART_SIDE = 128


class Markup(str):
    """Text that is already HTML. `tag` escapes every other string."""


def tag(element: str, /, *children: str, **attributes: str) -> Markup:
    """Returns an HTML element; `class_="x"` gives class="x"."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    if element in ("img", "meta"):
        return Markup(f"<{element}{given}>")
    return Markup(f"<{element}{given}>{''.join(map(_safe, children))}</{element}>")


def _safe(text: str) -> str:
    return text if isinstance(text, Markup) else escape(str(text))


def join(parts: Sequence[Markup] | Iterator[Markup]) -> Markup:
    """Joins elements with line breaks."""
    return Markup("\n".join(parts))


def section(title: str, *children: Markup) -> Markup:
    """Returns a section of the page with its heading."""
    return tag("section", tag("h2", title), *children)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], class_: str = "") -> Markup:
    """Returns a table whose first column names the rows, in a box that scrolls on narrow screens."""
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    cells = tag("table", tag("thead", head) if header else Markup(), tag("tbody", *body))
    return tag("div", cells, class_=f"table {class_}".strip())


def drawing(figure: Figure, name: str, title: str, caption: str) -> Markup:
    """Returns a figure as inline SVG, with its title and caption; `name` must be unique on the page."""
    image = Markup(style.svg(figure, name, f"{title}. {caption}".strip()))
    return tag("figure", tag("h3", title), image, tag("figcaption", caption) if caption else Markup())


def document(title: str, sections: Sequence[Markup]) -> str:
    """Returns the complete page; empty sections are left out."""
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Markup(_colors() + STYLE)),
        ]
    )
    body = tag("body", tag("main", join([section for section in sections if section])))
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'


def _colors() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in style.PALETTE.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def picture(source: bytes | str | Path) -> Markup:
    """Returns an <img> element that contains its image, reduced in size if it is large."""
    name = "a picture" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, side = image.get_format_mimetype(), max(image.size)
            if len(data) > MAX_PICTURE_BYTES:
                image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
                smaller = io.BytesIO()
                image.convert("RGB").save(smaller, "JPEG", quality=85)
                data, kind = smaller.getvalue(), "image/jpeg"
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(
            f"'examples' in the report holds {name}, which cannot be read as an image: {error}."
        ) from error
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=uri, alt="the picture asked about", class_="pixels" if side <= PIXEL_ART_SIDE else "")


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
