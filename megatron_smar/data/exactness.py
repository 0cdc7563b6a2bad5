# SPDX-License-Identifier: Apache-2.0
"""Exact tokenization of the pieces of a text: the ids decode to the same text, whatever a tokenizer prepends.

SentencePiece and Llama's Hugging Face tokenizers add a space before their input, some after every special token too;
others strip, collapse or replace characters. The added space is removed here; `changed` detects everything else.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from tokenizers import Tokenizer

# Whitespace at either end and in runs, which tokenizers strip, collapse or prepend ...
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
# ... and what normalizers replace: case, accents, ligatures, widths, quotes, other kinds of spaces.
CHARACTERS = ("Aa", "é", "e\u0301", "ﬁ", "２", "①", "…", "``a''", "\u00a0a", "\u3000a", "x²", "a\u200bb")


class HuggingFacePieces:
    """Encodes pieces of text with a Hugging Face tokenizer, without the space that it adds before each piece.

    Args:
        fast: Fast tokenizer of transformers.
        end_id: Id of a token that never occurs in text.
        end: Name of that token.
    """

    def __init__(self, fast: Any, end_id: int, end: str) -> None:
        """Copies the tokenizer if its settings have to be changed."""
        settings = json.loads(fast.backend_tokenizer.to_str())
        self.puts_space = set_prefix(settings, "never")
        self._backend = Tokenizer.from_str(json.dumps(settings)) if self.puts_space else fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._end_id, self._end = end_id, end

    def encode(self, text: str, begins_text: bool) -> list[int]:
        """Returns the ids of a piece; the first piece of a text keeps the tokenizer's space, as with SentencePiece."""
        front = " " if begins_text and self.puts_space else ""
        ids: list[int] = self._backend.encode(front + text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """Decodes ids to text, after another token, because decoders strip the space at the start of a text."""
        text: str = self._backend.decode([self._end_id, *ids], skip_special_tokens=False).removeprefix(self._end)
        return text.removeprefix(" ") if begins_text and self.puts_space else text


class GuardedPieces:
    """Encodes pieces of text with any other tokenizer, between two image tokens, which never merge with text.

    Args:
        tokenizer: Megatron text tokenizer.
        end_id: Id of a token that never occurs in text.
        end: Name of that token.
        bos_id: Id of the beginning-of-sentence token, None if there is none.
    """

    def __init__(self, tokenizer: Any, end_id: int, end: str, bos_id: int | None) -> None:
        self.puts_space = tokenizer._tokenizer.text_to_tokens("a")[0].startswith("▁")
        self._tokenizer, self._end_id, self._end, self._bos_id = tokenizer, end_id, end, bos_id

    def encode(self, text: str, begins_text: bool) -> list[int]:
        """Returns the ids of a piece; the first piece of a text keeps what the tokenizer prepends."""
        if begins_text:
            ids = self._tokenizer.tokenize(text + self._end)
            first = 1 if self._bos_id is not None and ids[0] == self._bos_id else 0
        else:
            ids = self._tokenizer.tokenize(self._end + text + self._end)
            first = ids.index(self._end_id) + 1
        last = len(ids) - 1 - ids[::-1].index(self._end_id)
        return list(ids[first:last])

    def decode(self, ids: list[int], begins_text: bool) -> str:
        """Decodes ids to text."""
        guarded = [*ids, self._end_id] if begins_text else [self._end_id, *ids, self._end_id]
        text: str = self._tokenizer.detokenize(guarded)
        return text.removesuffix(self._end) if begins_text else text.removeprefix(self._end).removesuffix(self._end)


Pieces = HuggingFacePieces | GuardedPieces


def fast_tokenizer(tokenizer: Any) -> Any | None:
    """Returns the transformers tokenizer inside a Megatron tokenizer, None unless it is a fast one."""
    inner = getattr(tokenizer._tokenizer, "tokenizer", None)
    return inner if isinstance(getattr(inner, "backend_tokenizer", None), Tokenizer) else None


def set_prefix(settings: dict[str, Any], scheme: str) -> bool:
    """Sets where a tokenizer adds a leading space, in the content of its tokenizer.json.

    Args:
        settings: Content of the file, changed in place.
        scheme: "never", or "first" for the beginning of a text only, not after special tokens.

    Returns:
        Whether the tokenizer added a space anywhere before this change.
    """
    normalizers, found = _parts(settings, "normalizer", "normalizers"), False
    kept = []
    for part in normalizers:
        prepends = part["type"] == "Prepend" and part["prepend"] == "▁"
        # transformers' conversion of SentencePiece models doubles a space at the beginning, for Metaspace to keep.
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
    """Returns whether two texts are the same up to Unicode equivalence: Qwen's tokenizers compose accents."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def changed(pieces: Pieces, unknown_id: int | None) -> tuple[str, str] | None:
    """Returns the first test text that a tokenizer changes, with the result, or None if it changes none.

    Args:
        pieces: Encodes and decodes with the tokenizer.
        unknown_id: Id of the tokenizer's unknown token. A rare character without a token is accepted here and reported
            for the samples that contain it.
    """
    for text in (*WHITESPACE, *CHARACTERS):
        for begins_text in (False, True):
            ids = pieces.encode(text, begins_text)
            read = pieces.decode(ids, begins_text)
            if not same_text(read, text) and not (text in CHARACTERS and unknown_id in ids):
                return text, read
    return None


def difference(text: str, read: str) -> str:
    """Returns the first place where a text differs from the decoded text, for an error message."""
    place = next((i for i, (a, b) in enumerate(zip(text, read, strict=False)) if a != b), min(len(text), len(read)))
    return f"{text[place : place + 8]!r}, at {place}"
