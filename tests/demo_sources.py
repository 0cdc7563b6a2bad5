# SPDX-License-Identifier: Apache-2.0
"""Sources for the demo that need no download: Python's manual as texts, and a font of colored squares."""

import json
import sys
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji_tiny"))  # the demo is programs, not a package

import scenes
import sources


def write_font(path: Path, characters: str) -> None:
    """Writes a colour (COLR) font with one square per character, each with a different colour and size."""
    names = [f"c{number}" for number in range(len(characters))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(character): name for character, name in zip(characters, names, strict=True)})
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for number, name in enumerate(names):
        pen, side = TTGlyphPen(None), 400 + 10 * number
        pen.moveTo((0, 0))
        for corner in ((0, side), (side, side), (side, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.setupCPAL([[(number / len(names), number % 7 / 7, number % 5 / 5, 1.0) for number in range(len(names))]])
    builder.setupCOLR({name: [(name, number)] for number, name in enumerate(names)})
    builder.save(path)


def write_sources(root: Path) -> Path:
    """Writes a cache like that of `sources.fetch`, with other contents; returns it."""
    paths = {source: [root / source.folder / member for member in source.members] for source in sources.SOURCES}
    for path in (path for members in paths.values() for path in members):
        path.parent.mkdir(parents=True, exist_ok=True)
    texts = [" ".join(text.replace("*", "").split()) for text in topics.values()]
    articles = {str(n): {"title": f"Topic {n}", "extract": text} for n, text in enumerate(texts[:50])}
    paths[sources.WIKIPEDIA][0].write_text(json.dumps(articles))
    records: list[list[dict[str, str]]] = [
        [{"passage": f"Topic {n} -- {text}"} for n, text in enumerate(texts[40:60], 40)],
        [{"title": f"Topic {n}", "passage": text} for n, text in enumerate(texts[55:65], 55)],
        [{"passage": f"Topic {n} -- {text}"} for n, text in enumerate(texts[65:70], 65)],
        [{"passage": f"{text} CANNOTANSWER"} for text in texts[70:]],
    ]
    for path, lines in zip(paths[sources.READING], records, strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_font(paths[sources.OPENMOJI][0], "".join(unicodedata.lookup(name) for name in scenes.OBJECTS.values()))
    paths[sources.OPENMOJI][1].write_text("CC BY-SA 4.0")
    return root
