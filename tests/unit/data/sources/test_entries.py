# SPDX-License-Identifier: Apache-2.0
"""Streaming records: reading in chunks gives the same values as Python's json, and broken entries are named."""

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.data.sources import entries
from megatron_smar.data.sources.entries import BrokenEntry, read_list, read_members

numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(max_size=8) | st.sampled_from(["\ud800", "\U0001f600", '\\"', "\u2028\x85"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def read(content: bytes, member: str | None = None) -> list[Any]:
    return list(read_list(io.BytesIO(content), member))


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(values, min_size=1, max_size=4),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
)
def test_a_list_gives_pythons_values_for_any_chunk_size(records: list[Any], chunk: int, indent: int | None) -> None:
    full = json.dumps(records, indent=indent, ensure_ascii=False)
    raw = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", full).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entries, "_CHUNK", chunk)
        assert read(raw) == json.loads(raw)
        assert read(b'{"annotations": ' + raw + b', "more": [1]}', "annotations") == json.loads(raw)
        content = b'{"meta": [{}], "data": {"a": ' + raw + b', "b": 1}}'
        assert list(read_members(io.BytesIO(content), "data")) == [("a", json.loads(raw)), ("b", 1)]


def test_numbers_beyond_64_bits_are_read_to_the_last_digit() -> None:
    assert read(b'[{"id": 9223372036854775808}, {"id": 123456789012345678901234567890}]') == [
        {"id": 2**63},
        {"id": 123456789012345678901234567890},
    ]


BROKEN = {
    b"[]": "it is an empty list",
    b" [ \n ] ": "it is an empty list",
    b"": "it is empty",
    b"\xef\xbb\xbf \n": "it is empty",
    b"[1,": "it is not a JSON list (record 2, line 1, column 4: the file ends here)",
    b'[{"a": "bc': "it is not a JSON list (record 1, line 1, column 8: Unterminated string starting at)",
    b"[1 2]": "it is not a JSON list (record 1, line 1, column 4: ',' is missing)",
    b"[1,]": "it is not a JSON list (record 2, line 1, column 4: Expecting value)",
    b'[{"a": 1},\n {"a": }]': "it is not a JSON list (record 2, line 2, column 8: Expecting value)",
    b'[{"a": "\xff"}]': "it is not a JSON list (record 1, line 1, column 8: byte 0xff at 8 of the file is not UTF-8)",
    b'[{"a": 1}, {"b": "caf\xe9"}]': "(record 2, line 1, column 18: byte 0xe9 at 21 of the file is not UTF-8)",
    b"[1] 2": "it is not a JSON list (line 1, column 5: more text follows its end)",
    b"\xff\xfe[\0": "it is UTF-16, not UTF-8",
    b"hello\n": "it is neither a JSON list nor JSON lines (line 1 is not JSON (Expecting value at column 1))",
    b"1\n2\n": "it is neither a JSON list nor JSON lines (no line is a JSON object)",
}


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_named_with_the_record_and_the_place(
    content: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_CHUNK", chunk)
    with pytest.raises(ValueError, match=re.escape(BROKEN[content])):
        read(content)


def test_entries_before_a_broken_place_are_read() -> None:
    stream = read_list(io.BytesIO(b'[{"a": 1}, {"a": \xff}]'))
    assert next(stream) == {"a": 1}


def test_broken_lines_are_named_by_number_and_do_not_affect_others() -> None:
    content = (
        b'{"a": "\xe2\x80\xa8\xc2\x85"}\r\n\n{"a": \n"caf\xe9"\n{"a": 1, "a": 2}\n' + b"[" * 100_000 + b'\n{"b": 2}'
    )
    good, *broken, last = read(content)
    assert (good, last) == ({"a": "\u2028\x85"}, {"b": 2})
    assert broken == [
        BrokenEntry("bad_record", "line 3 is not JSON (Expecting value at column 7)"),
        BrokenEntry("not_utf8", "line 4 is not UTF-8 (byte 0xe9 at 4)"),
        BrokenEntry("bad_record", "line 5 cannot be read: it has the key 'a' twice"),
        BrokenEntry("bad_record", "line 6 is nested too deeply"),
    ]


def test_a_duplicate_key_rejects_its_record_and_not_the_list() -> None:
    content = b'[{"a": 1}, {"b": {"a": 1, "a": 2}}, {"a": 3}]'
    assert read(content) == [{"a": 1}, BrokenEntry("bad_record", "record 2 has the key 'a' twice"), {"a": 3}]
