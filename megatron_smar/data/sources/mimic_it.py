# SPDX-License-Identifier: Apache-2.0
"""MIMIC-IT: instructions by id, and images as base64 strings in JSON files of many gigabytes.

Follows github.com/Luodian/Otter, docs/mimicit_format.md, mimic-it/README.md and mimic-it/convert-it:

- `LA_instructions.json`: `{"meta": ..., "data": {ID: {"instruction", "answer", "image_ids", "rel_ins_ids"}}}`.
- `LA.json`: `{IMAGE_ID: BASE64, ...}`. Otter's newer Parquet files contain the same strings.

Each instruction becomes one record that starts with all of its images, as Otter reads it without a `*_train.json`:
`rel_ins_ids`, the examples for in-context learning, are not used. The paper's 256k records match LLaVA's conversations
with one question each (`LACONV_instructions.json`). Their image ids are `LA_00_IMG_...`, and the ids that convert-it
writes are `LA_IMG_...`; both are found.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_smar.data.fields import check_keys
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.records import ImageSlice, SourceRecord, talk

_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{\s*")
_NAME = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*(?:\[\s*)?"')
_CLOSING = re.compile(rb'"\s*(?:\]\s*)?([,}])')


class Base64Images:
    """The places of the images in JSON files `{IMAGE_ID: BASE64, ...}`.

    The files are scanned once and not kept in memory; each image takes about 250 bytes.

    Args:
        paths: The files.
        advance: Called with the number of bytes that have been scanned since the last call.

    Raises:
        ValueError: A file cannot be read, or does not have this form.
    """

    def __init__(self, paths: Iterable[str | Path], advance: Callable[[int], Any] = lambda _: None) -> None:
        self._places: dict[str, tuple[str, int, int]] = {}
        for path in map(str, paths):
            position = 0
            for image_id, start, end in _find_strings(path):
                self._places[_plain_id(image_id)] = (path, start, end - start)
                advance(end - position)
                position = end

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._places)

    def find(self, image_id: str) -> ImageSlice | None:
        """Returns the place of an image, None if it is in none of the files."""
        place = self._places.get(_plain_id(image_id))
        return None if place is None else ImageSlice(*place)


def convert(entry: tuple[str, Any], images: Base64Images) -> Iterator[SourceRecord]:
    """Yields the one record of an instruction.

    Args:
        entry: The instruction's id and content.
        images: Places of the images.

    Raises:
        SampleError: `bad_record`, `unsupported_key` or `missing_image`.
    """
    name, content = entry
    if not isinstance(content, dict):
        raise SampleError("bad_record", "the instruction is not a JSON object")
    image_ids = content.get("image_ids") or []
    if not isinstance(image_ids, list) or not all(isinstance(image_id, str) for image_id in image_ids):
        raise SampleError("bad_record", "`image_ids` is not a list of ids")
    slices = tuple(images.find(image_id) for image_id in image_ids)
    found = tuple(image for image in slices if image is not None)
    if len(found) < len(image_ids):
        raise SampleError("missing_image", f"{image_ids[slices.index(None)]} is in none of the --image-files")
    question, answer = content.get("instruction"), content.get("answer")
    if isinstance(question, str) and isinstance(answer, str):  # as Otter's pre_question and pre_answer
        question, answer = question.strip(" ").strip("\n"), answer.strip().replace("\r\n", "\n")
    data = {"id": name, "conversations": talk([(question, answer)], len(found))}
    unread = check_keys(content, {"instruction", "answer", "image_ids", "rel_ins_ids"})
    yield SourceRecord(data | ({"image": image_ids} if image_ids else {}), found, unread=tuple(unread))


def _plain_id(image_id: str) -> str:
    return image_id.replace("_00_IMG_", "_IMG_", 1)


def _find_strings(path: str) -> Iterator[tuple[str, int, int]]:
    """Yields each image's id, and the start and end of its base64 string in bytes."""
    if path.endswith(".parquet"):
        raise ValueError(
            f"--image-files {path} is Parquet: write it as JSON {{IMAGE_ID: BASE64}} first, e.g. with "
            "pandas.read_parquet(FILE)['base64'].to_json(OUTPUT)."
        )
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from _find_in(data, path)
    except (OSError, ValueError) as error:
        if str(error).startswith("--image-files"):
            raise
        raise ValueError(f"--image-files {path} cannot be read ({error}).") from error


def _find_in(data: mmap.mmap, path: str) -> Iterator[tuple[str, int, int]]:
    opening = _OPENING.match(data)
    position = opening.end() if opening else 0
    is_open = opening is not None and data[position : position + 1] != b"}"
    while is_open:
        name = _NAME.match(data, position)
        end = data.find(b'"', name.end()) if name else -1
        closing = _CLOSING.match(data, end) if end > 0 else None
        # base64 has no backslash, so that the first quotation mark is the string's end.
        if name is None or closing is None or data[end - 1 : end] == b"\\":
            break
        yield json.loads(name[1]), name.end(), end
        if closing[1] == b"}":
            return
        position = closing.end()
    if opening is None or is_open:
        raise ValueError(
            f"--image-files {path} is not {{IMAGE_ID: BASE64, ...}} (at byte {position:,}): give MIMIC-IT's file of "
            "images, e.g. LA.json."
        )
