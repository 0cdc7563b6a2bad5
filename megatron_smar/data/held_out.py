# SPDX-License-Identifier: Apache-2.0
"""Held-out records for tools/evaluate.py: read and checked as tools/data/prepare.py does, before a model is loaded.

A record that cannot be used ends the program, where training would leave it out: a measurement of other records than
those asked for is no measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_smar.data.conversations import TEMPLATES, record_segments
from megatron_smar.data.fields import check_keys, counted, image_modalities, image_paths, is_empty
from megatron_smar.data.images import which
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.sources.entries import BrokenEntry, read_list
from megatron_smar.data.sources.shards import read_picture

_QUESTION_KEYS = frozenset({"image", "images", "image_modality", "question", "answer", "kind"})


def read_texts(path: Path) -> list[dict[str, Any]]:
    """Return the records of ``--text``, a JSON list or JSON lines.

    Raises:
        ValueError: The file or one of its records cannot be used; the message is one sentence for the user.
    """

    def check(record: Any) -> dict[str, Any]:
        if isinstance(record, dict) and (paths := image_paths(record)):
            raise SampleError(
                "image_count_mismatch", f"it has {counted(len(paths), 'image')}, but --text is text alone"
            )
        record_segments(record, TEMPLATES["mistral"], 0)
        return dict(record)

    return _read("--text", path, check)


def read_questions(path: Path, image_root: Path) -> list[dict[str, Any]]:
    """Return the records of ``--vqa``, a JSON list or JSON lines, with `image` as a list of paths that can be read.

    Raises:
        ValueError: The file, one of its records or a picture cannot be used; the message is one sentence for the user.
    """

    def check(record: Any) -> dict[str, Any]:
        if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
            raise SampleError("bad_record", "the record is no JSON object with `question` and `answer`")
        check_keys(record, _QUESTION_KEYS)
        for key in ("question", "answer"):
            if not isinstance(record[key], str):
                raise SampleError("bad_record", f"`{key}` is not a text")
        paths = image_paths(record)
        turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["answer"]}]
        record_segments({"conversations": turns}, TEMPLATES["mistral"], len(paths))
        image_modalities(record, len(paths))
        for number, name in enumerate(paths, 1):
            try:
                read_picture({"paths": [name]}, image_root)
            except SampleError as error:
                raise SampleError(error.reason, which(number, len(paths)) + error.message) from error
        kind = {} if is_empty(record.get("kind")) else {"kind": str(record["kind"])}
        return {key: value for key, value in record.items() if key not in ("images", "kind")} | {"image": paths} | kind

    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root} is not a folder.")
    return _read("--vqa", path, check)


def _read(flag: str, path: Path, check: Callable[[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            for entry in read_list(file):
                records.append(_checked(entry, check, f"{flag} {path}: record {len(records) + 1}"))
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read ({error.strerror}).") from error
    except _RecordError:
        raise
    except ValueError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}.") from error
    return records


class _RecordError(ValueError):
    """A record that cannot be used, already named."""


def _checked(entry: Any, check: Callable[[Any], dict[str, Any]], where: str) -> dict[str, Any]:
    if isinstance(entry, BrokenEntry):
        raise _RecordError(f"{where}: {entry.message}.")
    name = f" (id {entry['id']})" if isinstance(entry, dict) and not is_empty(entry.get("id")) else ""
    try:
        return check(entry)
    except SampleError as error:
        raise _RecordError(f"{where}{name}: {error.message}.") from error
