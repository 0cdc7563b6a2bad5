# SPDX-License-Identifier: Apache-2.0
"""The entries of a file of records, one at a time: a published file of 1 GB takes as little memory as a small one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import ijson

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_list(file: BinaryIO, member: str | None = None) -> Iterator[Any]:
    """Yield the entries of a JSON list or of JSON lines; a line that is not JSON is None, to be rejected by name.

    Args:
        file: The records, from their beginning.
        member: The list may also be this first member of a JSON object.

    Raises:
        ValueError: The file is neither.
    """
    start = _start(file)
    if start.startswith(b"["):
        yield from _checked(ijson.items(file, "item", use_float=True), "a JSON list")
    elif member and re.match(rb'\{\s*"' + member.encode() + rb'"\s*:', start):
        yield from _checked(ijson.items(file, f"{member}.item", use_float=True), f"a JSON object with `{member}`")
    else:
        yield from _read_lines(file)


def read_members(file: BinaryIO, member: str) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the JSON object that is `member` of the file's JSON object.

    Raises:
        ValueError: The file is not like that.
    """
    _start(file)
    what = f"a JSON object with an object `{member}`"
    is_empty = True
    for entry in _checked(ijson.kvitems(file, member, use_float=True), what):
        is_empty = False
        yield entry
    if is_empty:
        raise ValueError(f"it is not {what} that has entries")


def _start(file: BinaryIO) -> bytes:
    """Leave the file behind a byte order mark; return what comes next, without space in front."""
    start = file.read(4096)
    skip = len(_BYTE_ORDER_MARK) if start.startswith(_BYTE_ORDER_MARK) else 0
    file.seek(skip)
    return start[skip:].lstrip()


def _checked(entries: Iterator[Any], what: str) -> Iterator[Any]:
    try:
        yield from entries
    except ijson.JSONError as error:
        message = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"it is not {what} ({' '.join(message.splitlines()[:1])})") from error


def _read_lines(file: BinaryIO) -> Iterator[Any]:
    has_record = False
    for line in file:
        if line.strip():
            entry = _parse_line(line)
            has_record |= isinstance(entry, dict)
            yield entry
    if not has_record:
        raise ValueError("it is neither a JSON list nor JSON lines, or has no records")


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
