# SPDX-License-Identifier: Apache-2.0
"""Readers of published datasets: each yields records in this project's format, one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources import llava, mimic_it, visual_genome
from megatron_smar.data.sources.entries import BrokenEntry, read_list, read_members
from megatron_smar.data.sources.mimic_it import Base64Images
from megatron_smar.data.sources.records import ImageFile, ImageSlice, SourceRecord, Unreadable

__all__ = ["FORMATS", "Base64Images", "ImageFile", "ImageSlice", "SourceRecord", "Unreadable", "read_source"]


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        read: Reads a file and yields its entries.
        convert: Converts an entry to records in this project's format; with `needs_images`, it also receives the
            `Base64Images`.
        needs_images: Whether the images are in separate files, `--image-files`, instead of below `--image-root`.
    """

    read: Callable[[BinaryIO], Iterator[Any]]
    convert: Callable[..., Iterator[SourceRecord]]
    needs_images: bool = False


FORMATS: dict[str, Format] = {
    "llava": Format(read_list, llava.convert),
    "svit": Format(read_list, visual_genome.convert_svit),
    "lvis_instruct": Format(read_list, llava.convert_lvis),
    "lrv": Format(functools.partial(read_list, member="annotations"), visual_genome.convert_lrv),
    "mimic_it": Format(functools.partial(read_members, member="data"), mimic_it.convert, needs_images=True),
}


def read_source(file: BinaryIO, name: str, images: Base64Images | None = None) -> Iterator[SourceRecord | Unreadable]:
    """Yields the records of one published file.

    Args:
        file: The opened file.
        name: Name of its format, one of `FORMATS`.
        images: The images, for formats that have them in separate files.

    Raises:
        ValueError: The file is not of that format.
    """
    source = FORMATS[name]
    for entry in source.read(file):
        if isinstance(entry, BrokenEntry):
            yield Unreadable(None, entry.reason, entry.message)
            continue
        try:
            yield from source.convert(entry, images) if source.needs_images else source.convert(entry)
        except SampleError as error:
            data = {"id": entry[0], "content": entry[1]} if isinstance(entry, tuple) else entry
            yield Unreadable(data, error.reason, error.message)
