# SPDX-License-Identifier: Apache-2.0
"""What a reader makes of one published record: a record of ours, and where its images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_smar.data.conversations import IMAGE_TAG


@dataclass(frozen=True)
class ImageFile:
    """An image file below the image root.

    Attributes:
        paths: Where it may lie; the first path that exists is taken, since archives are unpacked in several ways.
    """

    paths: tuple[str, ...]


@dataclass(frozen=True)
class ImageSlice:
    """An image as a base64 string inside a large file.

    Attributes:
        file: The large file.
        offset: Where the string begins, in bytes.
        length: Its length in bytes.
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class SourceRecord:
    """One record, not checked yet.

    Attributes:
        data: What becomes the sample's `.json`: `{"id", "conversations" or "text", ...}`.
        images: Its images, in the order of the `<image>` tags.
        trimmed: Turns that were left out of it.
        unread: Keys of the published entry that hold something which is not read (`check_keys`).
    """

    data: Any
    images: tuple[ImageFile | ImageSlice, ...] = ()
    trimmed: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A published entry of which no record of ours can be made.

    Attributes:
        data: The entry.
        reason: Slug by which such entries are counted.
        message: What is wrong with it.
    """

    data: Any
    reason: str
    message: str
    images: tuple[()] = ()


def talk(turns: Sequence[tuple[Any, Any]], num_images: int) -> list[dict[str, Any]]:
    """Returns questions and their answers as turns, with the images in front of the first question.

    What is not text stays as it is, for the check that names it.
    """
    conversations = []
    for number, (question, answer) in enumerate(turns):
        if number == 0 and num_images and isinstance(question, str):
            question = f"{IMAGE_TAG}\n" * num_images + question
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return conversations
