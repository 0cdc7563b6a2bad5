# SPDX-License-Identifier: Apache-2.0
"""Streaming records: what ijson reads through our file is what Python's json reads, and half surrogates are marked."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.data.conversations import NO_CHARACTER
from megatron_smar.data.sources import entries

PIECES = ["\\\\", "\\u", "\\ud83d", "\\ude00", "\\ud83d\\ude00", "ud800", "d", "8", "a", " ", "é", "\\n", "\\u0041"]


def expected(text: str) -> str:
    """What is to be read: Python's json keeps half a surrogate pair as it is."""
    return "".join(NO_CHARACTER if "\ud800" <= character <= "\udfff" else character for character in text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), min_size=1, max_size=4), st.integers(1, 9))
def test_half_surrogates_are_marked_wherever_the_file_is_cut(texts: list[str], chunk: int) -> None:
    good = [f'"{text}"' for text in texts if _is_json(text)]
    raw = f"[{', '.join(good)}]".encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "_CHUNK", chunk)
        assert list(entries.read_list(io.BytesIO(raw))) == [expected(json.loads(text)) for text in good]


def _is_json(text: str) -> bool:
    try:
        json.loads(f'"{text}"')
    except ValueError:
        return False
    return True
