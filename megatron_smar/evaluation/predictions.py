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
    """

    path: Path | None
    of: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def open(self, resume: bool) -> None:
        """Reads what an interrupted run has written, or begins the file.

        Args:
            resume: Whether an existing file is resumed from; otherwise it is written anew.

        Raises:
            BenchmarkError: The file holds predictions of something else.
        """
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if resume and self.path.is_file() else []
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.of) + "\n", encoding="utf-8")
            return
        if _parsed(lines[0]) != self.of:
            raise BenchmarkError(
                f"{self.path} holds predictions of {lines[0]}, and this run is of {json.dumps(self.of)}: remove the "
                "file, or give another --output"
            )
        complete = [record for line in lines[1:] if (record := _parsed(line)) is not None]
        for record in complete:
            self._keep(record)
        # Without a line that was cut off when the run was interrupted.
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in [self.of, *complete]) + "\n"
        self.path.write_text(text, encoding="utf-8")

    def add(self, records: Sequence[dict[str, str]], save: bool) -> None:
        """Adds records with `key` and `prediction`, or `key` and `skipped`, with `save` to the file too."""
        for record in records:
            self._keep(record)
        if save and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _keep(self, record: dict[str, str]) -> None:
        if "prediction" in record:
            self.texts[record["key"]] = record["prediction"]
        else:
            self.bad[record["key"]] = record["skipped"]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
