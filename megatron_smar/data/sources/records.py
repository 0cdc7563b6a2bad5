# SPDX-License-Identifier: Apache-2.0
"""The result of reading a published record: a record in this project's format, and the places of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smar.data.conversations import IMAGE_TAG


@dataclass(frozen=True)
class ImageFile:
    """An image file below the image root.

    Attributes:
        paths: Possible paths; the first path that exists is used, because archives are unpacked in different ways.
    """

    paths: tuple[str, ...]


@dataclass(frozen=True)
class ImageSlice:
    """An image as a base64 string inside a large file.

    Attributes:
        file: The large file.
        offset: Start of the string, in bytes.
        length: Length of the string, in bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class SourceRecord:
    """One record, not checked yet.

    Attributes:
        data: Content of the sample's `.json`: `{"id", "conversations" or "text", ...}`.
        images: The record's images, in the order of the `<image>` tags.
        trimmed: Number of turns that were removed from the record.
        unread: Keys of the published entry that are not empty and not read (`check_keys`).
    """

    data: Any
    images: tuple[ImageFile | ImageSlice, ...] = ()
    trimmed: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A published entry that cannot be converted to a record.

    Attributes:
        data: The entry.
        reason: Slug by which such entries are counted.
        message: What is wrong with the entry.
    """

    data: Any
    reason: str
    message: str
    images: tuple[()] = ()


def talk(turns: Sequence[tuple[Any, Any]], num_images: int) -> list[dict[str, Any]]:
    """Returns questions and answers as turns, with the image tags before the first question.

    Values that are not text are kept, for the check that reports them.
    """
    conversations = []
    for number, (question, answer) in enumerate(turns):
        if number == 0 and num_images and isinstance(question, str):
            question = f"{IMAGE_TAG}\n" * num_images + question
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return conversations
