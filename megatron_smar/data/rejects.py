# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used: why, which ones, and how many of them there were."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import get_worker_info


class SampleError(ValueError):
    """One sample that cannot be used.

    Args:
        reason: Short slug by which such samples are counted, e.g. ``image_count_mismatch``.
        message: What is wrong with this sample.
    """

    def __init__(self, reason: str, message: str) -> None:
        """Keep the two parts; ``str()`` gives ``reason: message``."""
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        """Return ``reason: message``."""
        return f"{self.reason}: {self.message}"


class DataError(RuntimeError):
    """The data as a whole cannot be used; the message is one sentence for the user."""


@dataclass
class RejectLog:
    """Names every rejected sample once on standard error and in a file, and stops when nothing but rejects arrives.

    One object serves one loader. Worker processes inherit copies of it, and each writes a file of its own.

    Args:
        name: Which loader this is; the files are called ``{name}-worker{i}.jsonl``.
        source: Where the samples come from, for messages.
        directory: Folder of the files; None writes none.
        limit: This many rejected samples in a row end the run.
        announce: Whether this process prints and writes; False on all but one rank of those that read the same samples.
    """

    name: str
    source: str
    directory: Path | None = None
    limit: int = 1000
    announce: bool = True
    _in_a_row: Counter[str] = field(default_factory=Counter, init=False)
    _seen: set[str] = field(default_factory=set, init=False)

    def add(self, key: str, error: SampleError) -> None:
        """Record one rejected sample.

        Raises:
            DataError: `limit` samples in a row have been rejected.
        """
        if self.announce and key not in self._seen:
            self._seen.add(key)
            print(f"skipped sample {key}: {error}", file=sys.stderr, flush=True)
            self._write(key, error)
        self._in_a_row[error.reason] += 1
        if self._in_a_row.total() >= self.limit:
            reasons = ", ".join(f"{reason} {count} times" for reason, count in self._in_a_row.most_common())
            raise DataError(
                f"The last {self.limit} samples in a row from {self.source} were rejected ({reasons}; the last was "
                f"{key}: {error.message}): mend the data, or the settings it was rejected for."
            )

    def accept(self) -> None:
        """Note that a sample was good, so that the row of rejects ends."""
        self._in_a_row.clear()

    def _write(self, key: str, error: SampleError) -> None:
        if self.directory is None:
            return
        worker = get_worker_info()
        path = Path(self.directory) / f"{self.name}-worker{worker.id if worker else 0:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "reason": error.reason, "message": error.message}, ensure_ascii=False)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_rejects(directory: str | Path, name: str = "") -> Counter[str]:
    """Count the rejected samples of a run by reason.

    A sample counts once, however many epochs, workers or restarts rejected it.

    Args:
        directory: The folder given to `RejectLog`.
        name: Only the loaders whose name begins so, e.g. ``train``.

    Returns:
        reason -> number of samples.
    """
    reasons: dict[tuple[str, str], str] = {}
    for path in sorted(Path(directory).glob(f"{name}*-worker*.jsonl")):
        split = path.name.split("-", 1)[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            reject = json.loads(line)
            reasons[split, reject["key"]] = reject["reason"]
    return Counter(reasons.values())
