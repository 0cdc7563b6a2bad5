# SPDX-License-Identifier: Apache-2.0
"""Reads the entries of a file of records one at a time: a file of 1 GB takes as little memory as a small file.

Python's own JSON decoder reads each entry, so that a list gives exactly the same values as JSON lines: integers of any
size, and lone surrogates unchanged, for the check that reports them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_DELIMITERS = tuple(" \t\n\r,:]}")  # characters that end a number
# At the end of a chunk, the decoder cannot see whether a number, a literal or an escape continues in the next chunk.
_LONGEST_TOKEN = 16


@dataclass(frozen=True)
class BrokenEntry:
    """A line of JSON lines, or an entry of a list, that cannot be read; the other entries may still be valid.

    Attributes:
        reason: Slug by which such entries are counted.
        message: What is wrong with the entry, with its number.
    """

    reason: str
    message: str


def read_list(file: BinaryIO, member: str | None = None) -> Iterator[Any]:
    """Yields the entries of a JSON list or of JSON lines; an entry that is broken on its own is a `BrokenEntry`.

    Args:
        file: The file of records, at its start.
        member: If given, the list may also be the value of this first member of a JSON object.

    Raises:
        ValueError: The file is neither, is broken somewhere, or has no entries.
    """
    start = _start(file)
    if start.startswith(b"["):
        text = _Text(file, "a JSON list")
        text.expect("[")
        yield from _read_array(text)
        text.expect_end()
    elif member and re.match(rb'\{\s*"' + member.encode() + rb'"\s*:', start):
        text = _Text(file, f"a JSON object with `{member}`")
        for _ in _find_member(text, member):
            text.expect("[")
            yield from _read_array(text)
    else:
        yield from _read_lines(file, start)


def read_members(file: BinaryIO, member: str) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of the JSON object that is `member` of the file's JSON object.

    Raises:
        ValueError: The file does not have this form, or is broken somewhere.
    """
    _start(file)
    what = f"a JSON object with an object `{member}`"
    text, is_empty = _Text(file, what), True
    for _ in _find_member(text, member):
        for name in _names(text):
            text.count += 1
            yield name, text.value()
            is_empty = False
    if is_empty:
        raise ValueError(f"it is not {what} that has entries")


def _find_member(text: _Text, member: str) -> Iterator[None]:
    """Yields once, at the value of `member` of the file's object, which the caller reads; skips all other members."""
    for name in _names(text):
        if name == member:
            yield
        else:
            text.value()
    text.expect_end()


def _names(text: _Text) -> Iterator[str]:
    """Yields the names of an object; the caller reads the value after each name."""
    text.expect("{")
    if text.skip("}"):
        return
    while True:
        name = text.value()
        if not isinstance(name, str):
            text.fail("a name in quotation marks is missing")
        text.expect(":")
        yield name
        if text.skip("}"):
            return
        text.expect(",")


def _read_array(text: _Text) -> Iterator[Any]:
    """Yields the values of a list, after its opening bracket."""
    if text.skip("]"):
        raise ValueError("it is an empty list" if text.what == "a JSON list" else f"it is {text.what} that is empty")
    while True:
        text.count += 1
        value = text.value()
        twice = text.twice
        yield value if twice is None else BrokenEntry("bad_record", f"record {text.count} has the key {twice!r} twice")
        if text.skip("]"):
            return
        text.expect(",")


class _Text:
    """A JSON text of which one chunk at a time is in memory.

    Args:
        file: The file of the text.
        what: What the file is expected to be, for messages.
    """

    def __init__(self, file: BinaryIO, what: str) -> None:
        self.what = what
        self.count = 0  # number of the current entry, from 1
        self.twice: str | None = None  # a key that appears twice in one object of the last value
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._bytes = "", 0, file.tell()
        self._line, self._column = 1, 1  # of the first character in memory
        self._is_all, self._is_broken, self._ends_with = False, False, "the file ends here"
        self._parse = json.JSONDecoder(object_pairs_hook=self._object).raw_decode

    def skip(self, char: str) -> bool:
        """Skips a character if it comes next; returns whether it did."""
        found = self._next() == char
        self._at += found
        return found

    def expect(self, char: str) -> None:
        """Skips a character, or raises an error if it is missing."""
        if not self.skip(char):
            self.fail(f"{char!r} is missing" if self._next() else self._ends_with)

    def expect_end(self) -> None:
        """Raises an error if there is more text."""
        if self._next():
            self.count = 0
            self.fail("more text follows its end")

    def value(self) -> Any:
        """Reads the value that comes next."""
        self._next()
        while True:
            self.twice, start = None, self._at
            try:
                value, end = self._parse(self._text, start)
            except json.JSONDecodeError as error:
                # A string, or a token at the end of the chunk, may continue in the next chunk; the rest is broken.
                may_continue = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_TOKEN
                if not may_continue or not self._read():
                    self._at += error.pos - start
                    is_end = may_continue and (self._is_broken or self._at >= len(self._text.rstrip()))
                    self.fail(self._ends_with if is_end else error.msg)
            except RecursionError:
                self.fail("it is nested too deeply")
            except ValueError as error:  # a number with thousands of digits
                self.fail(str(error))
            else:
                may_continue = end > len(self._text) - _LONGEST_TOKEN and self._text[end : end + 1] not in _DELIMITERS
                if not may_continue or not self._read():
                    self._at += end - start
                    return value

    def fail(self, message: str) -> NoReturn:
        """Raises an error with the place in the file.

        Raises:
            ValueError: Always.
        """
        line, column = self._place()
        entry = f"record {self.count}, " if self.count else ""
        raise ValueError(f"it is not {self.what} ({entry}line {line}, column {column}: {message})")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.twice = key_twice(pairs)
        return found

    def _place(self) -> tuple[int, int]:
        """Returns the line and the column of the next character, from 1."""
        newlines = self._text.count("\n", 0, self._at)
        if newlines:
            return self._line + newlines, self._at - self._text.rfind("\n", 0, self._at)
        return self._line, self._column + self._at

    def _next(self) -> str:
        """Returns the next character after whitespace, "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Reads a chunk, as large as the text in memory, so that a large entry is not parsed again too often."""
        if self._is_all:
            return False
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        try:
            more = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = self._bytes + len(data) - len(error.object) + error.start
            self._ends_with = f"byte {error.object[error.start]:#04x} at {at:,} of the file is not UTF-8"
            more, self._is_all, self._is_broken = error.object[: error.start].decode(), True, True
        self._bytes += len(data)
        self._is_all |= not data
        self._line, self._column = self._place()
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(more) or not self._is_all


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it has the key {key_twice(pairs)!r} twice")
    return found


def key_twice(pairs: list[tuple[str, Any]]) -> str:
    """Returns the first key that appears twice in an object; Python's decoder would keep the last value."""
    names = [name for name, _ in pairs]
    return next(name for name in names if names.count(name) > 1)


def _start(file: BinaryIO) -> bytes:
    """Skips a byte order mark; returns the start of the text after it, without leading whitespace."""
    start = file.read(4096)
    if start.startswith(_UTF16_MARKS):
        raise ValueError("it is UTF-16, not UTF-8")
    skip = len(_BYTE_ORDER_MARK) if start.startswith(_BYTE_ORDER_MARK) else 0
    file.seek(skip)
    return start[skip:].lstrip()


def _read_lines(file: BinaryIO, start: bytes) -> Iterator[Any]:
    has_record, first = False, None
    for number, line in enumerate(file, 1):
        if line.strip():
            entry = _parse_line(line, number)
            has_record |= isinstance(entry, dict)
            first = first or entry
            yield entry
    if not has_record:
        if not start:
            raise ValueError("it is empty")
        why = first.message if isinstance(first, BrokenEntry) else "no line is a JSON object"
        raise ValueError(f"it is neither a JSON list nor JSON lines ({why})")


def _parse_line(line: bytes, number: int) -> Any:
    try:
        return json.loads(line.rstrip(b"\r\n").decode(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return BrokenEntry("not_utf8", f"line {number} is not UTF-8 (byte {line[error.start]:#04x} at {error.start})")
    except json.JSONDecodeError as error:
        return BrokenEntry("bad_record", f"line {number} is not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return BrokenEntry("bad_record", f"line {number} is nested too deeply")
    except ValueError as error:
        return BrokenEntry("bad_record", f"line {number} cannot be read: {error}")
