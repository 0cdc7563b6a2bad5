# SPDX-License-Identifier: Apache-2.0
"""Splits the archive members of a sample into its JSON record and its image files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from megatron_smar.data.rejects import SampleError


def split_parts(key: str, parts: Mapping[str, bytes]) -> tuple[Any, list[bytes]]:
    """Returns a sample's record, and its image files in the order of their numbers.

    Args:
        key: The sample's key, the part of its members' names before the first dot.
        parts: Rest of a member's name (`json`, `0.jpg`, `1.png`) -> content.

    Raises:
        SampleError: `unsafe_path` or `bad_record`.
    """
    for name in parts:
        check_member_name(f"{key}.{name}")
    if "json" not in parts:
        raise SampleError("bad_record", "there is no .json file next to its images")
    record = parse_record(parts["json"])
    images = {name.split(".", 1)[0]: data for name, data in parts.items() if name != "json"}
    if sorted(images) != sorted(str(number) for number in range(len(parts) - 1)):
        names = ", ".join(sorted(parts))
        raise SampleError("bad_record", f"its images are not numbered 0, 1, ... without gaps (it has {names!r})")
    return record, [images[str(number)] for number in range(len(images))]


def check_member_name(name: str) -> None:
    """Refuses a name that points outside of the archive: nothing here unpacks it, but another program might.

    Raises:
        SampleError: `unsafe_path`.
    """
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise SampleError("unsafe_path", f"the archive's member {name!r} is an absolute path or contains ..")


def parse_record(data: bytes) -> Any:
    """Parses a record's JSON, which must be UTF-8 (with or without a byte order mark) and have each key only once.

    Raises:
        SampleError: `not_utf8` or `bad_record`.
    """
    try:
        # Decoded here, because `json` also accepts UTF-16 and encoded surrogates.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("not_utf8", f"its .json file is not UTF-8 ({error.reason} at byte {error.start})") from error
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        raise SampleError("bad_record", f"its .json file cannot be read ({error})") from error
    except RecursionError as error:
        raise SampleError("bad_record", "its .json file is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found
