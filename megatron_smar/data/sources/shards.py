# SPDX-License-Identifier: Apache-2.0
"""Writes shards of records from the work folder.

A shard is written atomically, followed by a note that says what became of its records. A run that was killed therefore
continues with the shards that have no note.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from megatron_smar.data.conversations import TEMPLATES, record_segments
from megatron_smar.data.images import read_image, which
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.records import SourceRecord, Unreadable

WORK = ".prepare"


@dataclass(frozen=True)
class Shard:
    """One shard to be written.

    Attributes:
        split: `train` or `val`.
        kind: `image`, `text` or, if it contains both, `shard`.
        number: The shard's number among the shards of its split and kind.
        offset: Start of the shard's records in the work folder's file of that split and kind, in bytes.
        count: Number of records, including those that will be skipped.
    """

    split: str
    kind: str
    number: int
    offset: int
    count: int

    @property
    def name(self) -> str:
        """The shard's path in the output folder."""
        return f"{self.split}/{self.kind}-{self.number:06d}.tar"

    @property
    def records(self) -> str:
        """The file in the work folder that contains the shard's records."""
        return f"{self.split}-{self.kind}.jsonl"

    @property
    def note(self) -> str:
        """The file in the work folder that says what became of the records; it exists once the shard is complete."""
        return f"done/{self.split}-{self.kind}-{self.number:06d}.json"


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: it exists either completely or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class RecordFile:
    """The work folder's file of one split and kind, with a line for each record.

    Args:
        work: The work folder.
        split: `train` or `val`.
        kind: `image`, `text` or `shard`, as in `Shard`.
        size: Number of records per shard.

    Attributes:
        shards: The shards, with the place of their lines in the file.
    """

    def __init__(self, work: Path, split: str, kind: str, size: int) -> None:
        self._size = size
        self._first = Shard(split, kind, 0, 0, 0)
        self._file = (work / self._first.records).open("wb")
        self.shards: list[Shard] = []

    def add(self, key: str, record: SourceRecord | Unreadable) -> None:
        """Adds a record, with the key that its sample will have."""
        if not self.shards or self.shards[-1].count == self._size:
            offset = self._file.tell()
            self.shards.append(dataclasses.replace(self._first, number=len(self.shards), offset=offset))
        self.shards[-1] = dataclasses.replace(self.shards[-1], count=self.shards[-1].count + 1)
        line = {"key": key} | vars(record) | {"images": [vars(image) for image in record.images]}
        self._file.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_shard(output: Path, image_root: Path, shard: Shard) -> int:
    """Writes one shard, then the note that says what became of its records.

    Args:
        output: The output folder, which contains the work folder.
        image_root: Folder that image paths start from.
        shard: The shard.

    Returns:
        The number of the shard's records, skipped ones included.
    """
    report: dict[str, Any] = {"kept": 0, "images": 0, "trimmed": 0, "unread": Counter(), "rejected": []}
    partial = output / WORK / "partial" / f"{shard.split}-{shard.kind}-{shard.number}-{os.getpid()}.tar"
    with partial.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
            for line in _read_lines(output / WORK / shard.records, shard):
                _write_sample(tar, line, image_root, report)
        file.flush()
        os.fsync(file.fileno())
    if report["kept"]:
        partial.replace(output / shard.name)
    else:
        partial.unlink()
    write_whole(output / WORK / shard.note, json.dumps(report))
    return shard.count


def _read_lines(path: Path, shard: Shard) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        file.seek(shard.offset)
        for _ in range(shard.count):
            yield json.loads(file.readline())


def _write_sample(tar: TarWriter, line: dict[str, Any], image_root: Path, report: dict[str, Any]) -> None:
    """Writes a record as a sample, or notes why it is skipped."""
    try:
        if "reason" in line:
            raise SampleError(line["reason"], line["message"])
        files = _read_members(line, image_root)
    except SampleError as error:
        reject = {"key": line["key"], "id": _id(line["data"]), "reason": error.reason, "message": error.message}
        report["rejected"].append(reject)
        return
    tar.write({"__key__": line["key"], **files})
    report["kept"] += 1
    report["images"] += len(files) - 1
    report["trimmed"] += line["trimmed"] > 0
    report["unread"].update(line["unread"])


def _id(data: Any) -> str:
    """Returns the id of a record, or of an entry of a published file."""
    return str(data.get("id", data.get("image_id", ""))) if isinstance(data, dict) else ""


def _read_members(line: dict[str, Any], image_root: Path) -> dict[str, bytes]:
    """Checks a record and its images; returns the sample's members, `json`, `0.jpg`, `1.png`, ..."""
    record_segments(line["data"], TEMPLATES["mistral"], len(line["images"]))
    try:
        members = {"json": json.dumps(line["data"], ensure_ascii=False).encode()}
    except UnicodeEncodeError as error:
        raise SampleError("invalid_unicode", f"the record cannot be written as UTF-8 ({error.reason})") from error
    for number, place in enumerate(line["images"]):
        try:
            data, suffix = read_picture(place, image_root)
        except SampleError as error:
            raise SampleError(error.reason, which(number + 1, len(line["images"])) + error.message) from error
        members[f"{number}.{suffix}"] = data
    return members


def read_picture(place: dict[str, Any], image_root: Path) -> tuple[bytes, str]:
    """Returns an image's bytes and suffix, after decoding it once to keep damaged images out of the shards.

    Raises:
        SampleError: The image does not exist, or is damaged; the message names it.
    """
    data, suffix, name = _read_slice(place) if "offset" in place else _read_file(image_root, place["paths"])
    try:
        read_image(data)
    except SampleError as error:
        raise SampleError(error.reason, f"{name}: {error.message}") from error
    return data, suffix


def _read_file(image_root: Path, paths: list[str]) -> tuple[bytes, str, str]:
    """Returns the content of the first file that exists, its suffix, and its name for messages."""
    for path in paths:
        if not _is_below(image_root, path):
            raise SampleError("unsafe_path", f"{path!r} leads out of the image root")
        place = os.path.join(image_root, path)
        try:
            with open(place, "rb") as file:
                return file.read(), _suffix(path), place
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise SampleError("missing_image", f"{place} cannot be read ({error.strerror})") from error
    raise SampleError("missing_image", f"{os.path.join(image_root, paths[0])} is not there")


def _is_below(root: Path, path: str) -> bool:
    """Returns whether a path stays below the image root; symbolic links are not resolved."""
    if "\0" in path:
        return False
    if ".." not in path and not os.path.isabs(path):  # the common case
        return True
    top = os.path.abspath(root)
    return os.path.commonpath([top, os.path.abspath(os.path.join(top, path))]) == top


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower().lstrip(".")
    return suffix if suffix.isascii() and suffix.isalnum() and suffix != "json" else "img"


def _read_slice(place: dict[str, Any]) -> tuple[bytes, str, str]:
    """Reads an image that is a base64 string in a larger file, in either base64 alphabet, with or without padding."""
    with open(place["file"], "rb") as file:
        file.seek(place["offset"])
        # JSON may escape a slash with a backslash, and pandas does.
        text = file.read(place["length"]).translate(bytes.maketrans(b"-_", b"+/"), b"\\").rstrip(b"=")
    name = f"the image at byte {place['offset']:,} of {place['file']}"
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True), "img", name
    except binascii.Error as error:
        raise SampleError("bad_image", f"{name} is not base64 ({error})") from error
