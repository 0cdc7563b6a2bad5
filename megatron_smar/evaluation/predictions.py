# SPDX-License-Identifier: Apache-2.0
"""The predictions of a benchmark in a file, from which an interrupted run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_smar.evaluation.benchmarks.base import BenchmarkError


@dataclass
class Predictions:
    """The predictions of one benchmark, in a file with one line per sample; written by rank 0.

    Attributes:
        path: The file; None to keep the predictions in memory alone.
        of: What the predictions belong to; a file of another model or version is refused.
        texts: The predictions by key.
        bad: Why samples were skipped, by key.
        unfinished: Keys of the predictions that end at the largest number of tokens, and not by themselves.
    """

    path: Path | None
    of: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)

    def open(self, resume: bool) -> None:
        """Reads what an interrupted run has written, or begins the file.

        Args:
            resume: Whether an existing file is resumed from; otherwise it is written anew.

        Raises:
            BenchmarkError: The file holds predictions of something else.
        """
        if self.path is None:
            return
        try:
            self._open(self.path, resume)
        except OSError as error:
            raise BenchmarkError(f"{self.path} cannot be read and written ({error.strerror})") from error

    def _open(self, path: Path, resume: bool) -> None:
        text = path.read_text(encoding="utf-8") if resume and path.is_file() else ""
        lines = [line for line in text.split("\n") if line]
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.of) + "\n", encoding="utf-8")
            return
        if _parsed(lines[0]) != self.of:
            raise BenchmarkError(
                f"{path} holds predictions of {lines[0]}, and this run is of {json.dumps(self.of)}: remove the "
                "file, or give another --output"
            )
        # Without a line that was cut off by an interruption, and without skipped samples, whose files may be repaired.
        complete = [record for line in lines[1:] if "prediction" in (record := _parsed(line) or {})]
        for record in complete:
            self._keep(record)
        replacement = path.with_suffix(".new")
        kept = "\n".join(json.dumps(record, ensure_ascii=False) for record in [self.of, *complete]) + "\n"
        replacement.write_text(kept, encoding="utf-8")
        replacement.replace(path)
        print(f"{path}: {len(complete)} answers are taken from an earlier run", flush=True)

    def add(self, records: Sequence[dict[str, Any]], save: bool) -> None:
        """Adds records with `key` and `prediction`, or `key` and `skipped`, with `save` to the file too.

        A prediction that was ended by the largest number of tokens also has `unfinished`.
        """
        for record in records:
            self._keep(record)
        if save and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _keep(self, record: dict[str, Any]) -> None:
        if "prediction" in record:
            self.texts[record["key"]] = record["prediction"]
            if record.get("unfinished"):
                self.unfinished.add(record["key"])
        else:
            self.bad[record["key"]] = record["skipped"]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
