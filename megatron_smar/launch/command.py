# SPDX-License-Identifier: Apache-2.0
"""What the launcher reads from the command that it starts, and what the command must not carry."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_smar.credentials import SECRET_NAME, check_flags

CONTROL = re.compile(r"[\n\r\0]")
DATA = ("--data-path", "--valid-data-path")


def values(command: Sequence[str], flag: str) -> Iterator[str]:
    """Yields the values that a command line gives to a flag, as `--flag A B` or `--flag=A`."""
    for number, word in enumerate(command):
        if word.startswith(f"{flag}="):
            yield word.partition("=")[2]
        elif word == flag:
            for value in command[number + 1 :]:
                if value.startswith("--"):
                    break
                yield value


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before the first `--`, which are a launcher's own, and those after it, the command."""
    place = list(words).index("--") if "--" in words else len(words)
    return list(words[:place]), list(words[place + 1 :])


def folder_of(command: Sequence[str], flag: str) -> Path | None:
    """Returns the folder that a command line gives to a flag, the last one if there are several; None without."""
    return next((Path(value) for value in reversed(list(values(command, flag)))), None)


def without(command: Sequence[str], flag: str) -> tuple[str, ...]:
    """Returns a command line without a flag and its one value."""
    kept, skip = [], False
    for word in command:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = not skip and word == flag
    return tuple(kept)


def data_paths(command: Sequence[str]) -> tuple[Path, ...]:
    """Returns the local files and folders from which a command reads its data."""
    return tuple(Path(value) for flag in DATA for value in values(command, flag) if "://" not in value)


def checksum(words: Sequence[str]) -> str:
    """Returns eight digits that tell command lines apart."""
    return hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]


def check_words(words: Sequence[str], what: str = "the command") -> None:
    """Refuses words that would not reach the program as they are, and secrets.

    Raises:
        ValueError: There is one; the message is one sentence.
    """
    for word in words:
        if CONTROL.search(word):
            raise ValueError(f"{what}'s word {word!r} has a line break; give each flag on its own.")
        if word.startswith("--") and SECRET_NAME.fullmatch(word.partition("=")[0]):
            raise ValueError(
                f"{what} has {word.partition('=')[0]}, which every user of the node could read in `ps`: set an "
                "environment variable before you start it."
            )
    check_flags(words)
