# SPDX-License-Identifier: Apache-2.0
"""A sweep as a job array: each line of a file has the further flags of one element.

An element's name is made of its flags and not of its line's number, so that a file from which a line was removed does
not resume an element from another one's checkpoints.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_smar.launch.command import check_words, checksum, folder_of, without

LONGEST = 60  # characters of a name


@dataclass(frozen=True)
class Element:
    """One run of a sweep.

    Attributes:
        name: Of its folders, made of its flags.
        words: What is added to the command, `--save` among it if it has checkpoints.
        save: Folder of its checkpoints; None without.
    """

    name: str
    words: tuple[str, ...]
    save: Path | None


def read_elements(file: Path, command: Sequence[str]) -> tuple[tuple[str, ...], tuple[Element, ...]]:
    """Reads a sweep.

    Args:
        file: A line for each element, in a shell's quoting; `#` begins a comment.
        command: Program and flags that all elements share. Its `--save` is the folder of the elements' folders; without
            it, elements have checkpoints only if their lines say so.

    Returns:
        The command without `--save` (and without a `--load` of the same folder), and the elements.

    Raises:
        ValueError: The file describes no sweep; the message is one sentence.
    """
    save, load = folder_of(command, "--save"), folder_of(command, "--load")
    command = without(command, "--save")
    resumes = save is not None and load == save
    if resumes:
        command = without(command, "--load")
    elements = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number} of {file} cannot be read ({error}): close its quotes.") from None
        if words:
            elements.append(_element(words, f"line {number} of {file}", save, resumes))
    _check(elements, file)
    return command, tuple(elements)


def _element(words: list[str], line: str, save: Path | None, resumes: bool) -> Element:
    check_words(words, line)
    if not words[0].startswith("-"):
        raise ValueError(f"{line} begins with {words[0]!r}; give flags, as in --lr 1e-4.")
    own = folder_of(words, "--save")
    name = name_of(without(words, "--save"))
    if own is None and save is None:
        return Element(name, tuple(words), None)
    folder = (own or Path(save or "") / name).resolve()
    added = [] if own is not None else ["--save", str(folder)]
    if resumes and folder_of(words, "--load") is None:
        added += ["--load", str(folder)]
    return Element(name, (*words, *added), folder)


def name_of(words: Sequence[str]) -> str:
    """Returns a folder's name for flags: `--lr 1e-4` becomes `lr_1e-4`; what is lost is replaced by a checksum."""
    text = "_".join(word.removeprefix("--").replace("=", "_") for word in words)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")
    if name == text and 0 < len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{checksum(words)}"


def _check(elements: Sequence[Element], file: Path) -> None:
    if not elements:
        raise ValueError(f"{file} has no element: give a line of flags for each.")
    for what in ("name", "save"):
        seen: set[object] = set()
        for element in elements:
            value = getattr(element, what)
            if value is not None and value in seen:
                word = "the same flags" if what == "name" else f"--save {value}"
                raise ValueError(f"two elements of {file} have {word}: each needs checkpoints of its own.")
            seen.add(value)
