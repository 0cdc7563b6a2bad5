# SPDX-License-Identifier: Apache-2.0
"""Pieces of a text to ids that spell exactly these pieces, whatever a tokenizer does to the beginning of a text.

SentencePiece and Llama's Hugging Face tokenizers put a space in front of what they are given, some behind every special
token too; others strip, collapse or replace. The first is undone here; the rest is found by `changed`.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from tokenizers import Tokenizer

# Whitespace at either end and in runs, where tokenizers strip, collapse or prepend ...
WHITESPACE = (
    *(
        "a",
        "\n",
        "\na",
        "a\n",
        "\n\na",
        "a\n\n\nb",
        " a",
        "  a",
        "a ",
        "a  b",
        " ",
        "\ta\t",
        "a\r\nb",
        "\n a",
        " \n\n  a",
    ),
    "\nWhat",
)
# ... and what normalisers replace: case, accents, ligatures, widths, quotes, spaces of other kinds.
CHARACTERS = ("Aa", "é", "e\u0301", "ﬁ", "２", "①", "…", "``a''", "\u00a0a", "\u3000a", "x²", "a\u200bb")


class HuggingFacePieces:
    """Pieces by a Hugging Face tokenizer, of which what it puts in front of each piece was taken off.

    Args:
        fast: transformers' tokenizer.
        end_id: A token that is no text.
        end: Its name.
    """

    def __init__(self, fast: Any, end_id: int, end: str) -> None:
        """Copies the tokenizer where something has to be taken off."""
        settings = json.loads(fast.backend_tokenizer.to_str())
        self.puts_space = set_prefix(settings, "never")
        self._backend = Tokenizer.from_str(json.dumps(settings)) if self.puts_space else fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._end_id, self._end = end_id, end

    def encode(self, text: str, begins_text: bool) -> list[int]:
        """Ids of a piece; the first of a text has the tokenizer's space in front, as SentencePiece puts it."""
        front = " " if begins_text and self.puts_space else ""
        ids: list[int] = self._backend.encode(front + text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """The text that they spell; behind another token, since decoders strip the space in front of a text."""
        text: str = self._backend.decode([self._end_id, *ids], skip_special_tokens=False).removeprefix(self._end)
        return text.removeprefix(" ") if begins_text and self.puts_space else text


class GuardedPieces:
    """Pieces by any other tokenizer: between two image tokens, which none of them merges with text.

    Args:
        tokenizer: Megatron text tokenizer.
        end_id: A token that is no text.
        end: Its name.
        bos_id: Its beginning-of-sentence token, if it has one.
    """

    def __init__(self, tokenizer: Any, end_id: int, end: str, bos_id: int | None) -> None:
        """Keeps them."""
        self.puts_space = tokenizer._tokenizer.text_to_tokens("a")[0].startswith("▁")
        self._tokenizer, self._end_id, self._end, self._bos_id = tokenizer, end_id, end, bos_id

    def encode(self, text: str, begins_text: bool) -> list[int]:
        """Ids of a piece; the first of a text has in front what the tokenizer puts there."""
        if begins_text:
            ids = self._tokenizer.tokenize(text + self._end)
            first = 1 if self._bos_id is not None and ids[0] == self._bos_id else 0
        else:
            ids = self._tokenizer.tokenize(self._end + text + self._end)
            first = ids.index(self._end_id) + 1
        last = len(ids) - 1 - ids[::-1].index(self._end_id)
        return list(ids[first:last])

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """The text that they spell."""
        guarded = [*ids, self._end_id] if begins_text else [self._end_id, *ids, self._end_id]
        text: str = self._tokenizer.detokenize(guarded)
        return text.removesuffix(self._end) if begins_text else text.removeprefix(self._end).removesuffix(self._end)


Pieces = HuggingFacePieces | GuardedPieces


def fast_tokenizer(tokenizer: Any) -> Any | None:
    """transformers' tokenizer inside of a Megatron one, if it is one of the `tokenizers` library."""
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    return inner if isinstance(getattr(inner, "backend_tokenizer", None), Tokenizer) else None


def set_prefix(settings: dict[str, Any], scheme: str) -> bool:
    """Says where a tokenizer puts a space in front, by its tokenizer.json.

    Args:
        settings: Content of the file, which is changed.
        scheme: "never", or "first" for the beginning of a text alone and not behind special tokens too.

    Returns:
        Whether it puts one anywhere.
    """
    normalizers, found = _parts(settings, "normalizer", "normalizers"), False
    kept = []
    for part in normalizers:
        prepends = part["type"] == "Prepend" and part["prepend"] == "▁"
        # transformers' own conversion of SentencePiece models doubles a space at the beginning, for Metaspace to keep.
        doubles = part["type"] == "Replace" and part["content"] == "▁▁" and part["pattern"] == {"Regex": "\\A▁"}
        found = found or prepends
        if not prepends and not doubles:
            kept.append(part)
    if len(kept) < len(normalizers):
        settings["normalizer"] = {"type": "Sequence", "normalizers": kept}
    added = []
    for part in _parts(settings, "pre_tokenizer", "pretokenizers"):
        if part["type"] == "Metaspace":
            found = found or part["prepend_scheme"] != "never"
            part["prepend_scheme"] = scheme if part["prepend_scheme"] != "never" else "never"
        elif part["type"] == "ByteLevel":
            found = found or part["add_prefix_space"]
            part["add_prefix_space"] = False
        added.append(part)
    if scheme == "first" and found and not any(part["type"] in ("Metaspace", "ByteLevel") for part in added):
        first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, *added]}
    return found


def _parts(settings: dict[str, Any], name: str, many: str) -> list[dict[str, Any]]:
    part = settings.get(name)
    return [] if part is None else part[many] if part["type"] == "Sequence" else [part]


def same_text(one: str, other: str) -> bool:
    """Returns whether two texts are the same, or what Unicode calls equivalent: Qwen's tokenizers compose accents."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def changed(pieces: Pieces, unknown_id: int | None) -> tuple[str, str] | None:
    """The first of some texts that a tokenizer changes, and what it becomes.

    Args:
        pieces: By the tokenizer.
        unknown_id: Its unknown token. A rare character without a token of its own is a matter of the samples with it.
    """
    for text in (*WHITESPACE, *CHARACTERS):
        for begins_text in (False, True):
            ids = pieces.encode(text, begins_text)
            read = pieces.decode(ids, begins_text)
            if not same_text(read, text) and not (text in CHARACTERS and unknown_id in ids):
                return text, read
    return None


def difference(text: str, read: str) -> str:
    """Where a text and what its ids spell part, for a sentence."""
    place = next((i for i, (a, b) in enumerate(zip(text, read, strict=False)) if a != b), min(len(text), len(read)))
    return f"{text[place : place + 8]!r}, at {place}"
