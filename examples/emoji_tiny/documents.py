# SPDX-License-Identifier: Apache-2.0
"""Tables that a program writes into a document, between two marks."""

from __future__ import annotations

from pathlib import Path


def replace_between_marks(document: Path, table: str, marks: tuple[str, str]) -> None:
    """Puts a table between the two marks of a document.

    Args:
        document: The document.
        table: What is put between the marks.
        marks: The lines before and after it.

    Raises:
        ValueError: The document cannot be read or does not have both marks, in order.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--write {document} cannot be read: {error.strerror}.") from error
    start, end = (text.find(mark) for mark in marks)
    if not 0 <= start < end:
        raise ValueError(f"--write {document} does not have the lines {marks[0]} and, after it, {marks[1]}: add them.")
    document.write_text(f"{text[: start + len(marks[0])]}\n{table}\n{text[end:]}", encoding="utf-8")
