# SPDX-License-Identifier: Apache-2.0
"""The entries of a file of records, one at a time: a published file of 1 GB takes as little memory as a small one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import ijson

from megatron_smar.data.conversations import NO_CHARACTER

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
# A surrogate's escape behind an even number of backslashes, whole pairs first, so that what is left is half of one.
_SURROGATE = re.compile(
    rb"(?<!\\)((?:\\\\)*)(?:(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_OF_ESCAPES = b"\\u0123456789abcdefABCDEF"


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
        yield from _checked(ijson.items(_Marked(file), "item", use_float=True), "a JSON list")
    elif member and re.match(rb'\{\s*"' + member.encode() + rb'"\s*:', start):
        entries = ijson.items(_Marked(file), f"{member}.item", use_float=True)
        yield from _checked(entries, f"a JSON object with `{member}`")
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
    for entry in _checked(ijson.kvitems(_Marked(file), member, use_float=True), what):
        is_empty = False
        yield entry
    if is_empty:
        raise ValueError(f"it is not {what} that has entries")


class _Marked:
    """A file in which the escape of half a surrogate pair is that of `NO_CHARACTER`, by which its record is rejected.

    ijson would put a question mark in its place, and nobody would know.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._rest = file, b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at least one of them but at the end; how many does not depend on `size`."""
        done = b""
        while size and not done:
            chunk = self._file.read(_CHUNK)
            data = self._rest + chunk
            # An escape, or a pair of them, may go on in the next chunk, and the backslashes in front of it count.
            end = len(data.rstrip(_OF_ESCAPES)) if chunk else len(data)
            done, self._rest = _SURROGATE.sub(_mark, data[:end]), data[end:]
            if not chunk:
                break
        return done


def _mark(found: re.Match[bytes]) -> bytes:
    return found[0] if found[2] else found[1] + f"\\u{ord(NO_CHARACTER):04x}".encode()


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
