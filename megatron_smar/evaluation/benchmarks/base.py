# SPDX-License-Identifier: Apache-2.0
"""What every multimodal benchmark defines: its files, its questions with their prompts, and its metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


class BenchmarkError(ValueError):
    """A benchmark's files cannot be used; the message is one sentence for the user, with file and fix."""


@dataclass(frozen=True)
class Question:
    """One prompt for the model.

    Attributes:
        key: Identifies the question within its benchmark.
        prompt: The user's turn, without `<image>`: the pictures come before it.
        images: The pictures, each as a path or as the bytes of its file.
        answers: The reference answers; empty where the answers are not published.
        group: Category, subtask or split for which the metric is also reported; "" for none.
        details: What else the metric needs, by name.
    """

    key: str
    prompt: str
    images: tuple[Path | bytes, ...] = ()
    answers: tuple[str, ...] = ()
    group: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be asked. It is named and counted, and never scored as wrong.

    Attributes:
        key: Identifies the sample within its benchmark.
        reason: What is wrong with it, half a sentence in lower case.
    """

    key: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """A question and what the model replied."""

    question: Question
    prediction: str


class Benchmark(ABC):
    """A published benchmark, read from a folder with its files as they are published.

    Args:
        folder: The benchmark's folder.
    """

    name: ClassVar[str]  # on the command line
    title: ClassVar[str]  # in tables
    source: ClassVar[str]  # paper, and where the files are published
    files: ClassVar[str]  # what has to be in the folder, for docs and error messages
    max_new_tokens: ClassVar[int]
    main_metric: ClassVar[str]  # the key of `score` that the paper reports

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = ""  # set by `read`: which of the accepted files were read, for the report

    @abstractmethod
    def read(self) -> list[Question | Skipped]:
        """Reads all samples; whether the pictures exist is checked here, their contents are not.

        Raises:
            BenchmarkError: A file is missing or is of another version or format.
        """

    @abstractmethod
    def score(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Returns the official metrics over the answers: `main_metric`, and each group's as `metric/group`.

        They are percentages, MME's are its points. Empty where the reference answers are not published.
        """

    def unit(self, key: str) -> str:
        """Returns a name that samples share if they are scored together: a limit keeps or leaves out whole units."""
        return key

    def submission(self, answers: Sequence[Answer]) -> dict[str, str]:
        """Returns what the benchmark's server or judge takes, each file's text by its name; empty where it has none."""
        return {}
