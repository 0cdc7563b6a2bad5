# SPDX-License-Identifier: Apache-2.0
"""Rejected samples: errors, log and counts of the samples that cannot be used."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import get_worker_info

FEWEST_JUDGED = 100  # samples of a worker before its share of rejects is checked


class SampleError(ValueError):
    """A sample cannot be used; `str()` gives `reason: message`.

    Args:
        reason: Short slug by which such samples are counted, e.g. `image_count_mismatch`.
        message: What is wrong with this sample.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class DataError(RuntimeError):
    """The data cannot be used, not only one sample of it; the message is one sentence for the user."""


@dataclass
class RejectLog:
    """Reports every rejected sample once on standard error and in a file, and ends the run if there are too many.

    Each loader has one such object. Worker processes inherit copies of it; each worker counts separately and writes its
    own file. Ranks that read the same samples have the same counts, and so stop at the same sample.

    Attributes:
        name: Name of the loader; the files are called `{name}-worker{i}.jsonl`.
        source: Path of the data, for messages.
        directory: Folder of the files; None writes no files.
        limit: The run ends after this many rejected samples in a row.
        announce: Whether this process prints and writes; True on only one of the ranks that read the same samples.
        max_skip_ratio: A larger share of rejects ends the run. It is checked after `FEWEST_JUDGED` samples, with a
            margin of three standard deviations, so that chance in one of hundreds of workers does not end the run; 1
            never ends it.
    """

    name: str
    source: str
    directory: Path | None = None
    limit: int = 1000
    announce: bool = True
    max_skip_ratio: float = 1.0
    _accepted: int = field(default=0, init=False)
    _rejected: Counter[str] = field(default_factory=Counter, init=False)
    _examples: dict[str, str] = field(default_factory=dict, init=False)
    _in_a_row: Counter[bool] = field(default_factory=Counter, init=False)
    _seen: set[str] = field(default_factory=set, init=False)

    def add(self, key: str, error: SampleError, *, late: bool = False) -> None:
        """Records one rejected sample.

        Args:
            key: The sample's key.
            error: What is wrong with the sample.
            late: Whether the sample had been accepted before, and its images turned out to be damaged when decoded.

        Raises:
            DataError: `limit` samples in a row, or a larger share than `max_skip_ratio`, have been rejected.
        """
        if self.announce and key not in self._seen:
            self._seen.add(key)
            print(f"skipped sample {_shown(key)}: {error}", file=sys.stderr, flush=True)
            self._write(key, error)
        self._rejected[error.reason] += 1
        self._examples.setdefault(error.reason, key)
        self._in_a_row[late] += 1
        if late:
            self._accepted = max(0, self._accepted - 1)  # a resumed run has not counted the samples in its buffers
        self._check(key, error)

    def accept(self, *, late: bool = False) -> None:
        """Counts an accepted sample, or with `late` the decoding of its images; this ends a row of rejects."""
        self._accepted += not late
        self._in_a_row[late] = 0

    def _check(self, key: str, error: SampleError) -> None:
        total = self._accepted + self._rejected.total()
        share, ratio = self._rejected.total() / total, self.max_skip_ratio
        fix = "fix the data, or the settings it was rejected for"
        if max(self._in_a_row.values()) >= self.limit:
            what = f"The last {self.limit} samples in a row from {self.source} were rejected"
            fix = f"(the last was {_shown(key)}: {error.message}): {fix}"
        elif total >= FEWEST_JUDGED and share > ratio + 3 * math.sqrt(ratio * (1 - ratio) / total):
            what = f"{share:.1%} of the first {total} samples that a worker read from {self.source} were rejected"
            fix = f"and --max-skip-ratio is {ratio}: {fix}, or raise it"
        else:
            return
        raise DataError(f"{what} {fix}.\n{format_rejects(self._rejected, self._examples, total)}")

    def _write(self, key: str, error: SampleError) -> None:
        if self.directory is None:
            return
        worker = get_worker_info()
        path = Path(self.directory) / f"{self.name}-worker{worker.id if worker else 0:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "reason": error.reason, "message": error.message}, ensure_ascii=False)
        # The name of a member that is not UTF-8 contains surrogates; "backslashreplace" writes them as JSON's escapes.
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def _shown(key: str) -> str:
    """Returns a key in printable form: it comes from the archive, and may contain control characters."""
    return key if key.isprintable() else ascii(key)


def format_rejects(rejected: Mapping[str, int], examples: Mapping[str, str], total: int | None = None) -> str:
    """Returns a table of rejects, the most frequent reason first.

    Args:
        rejected: Reason -> number of samples.
        examples: Reason -> key of one of those samples.
        total: Number of samples that were read; None omits the shares.
    """
    rows = [("reason", "samples", "" if total is None else "share", "for example")]
    for reason, count in sorted(rejected.items(), key=lambda item: (-item[1], item[0])):
        share = "" if total is None else f"{count / total:.2%}"
        rows.append((reason, str(count), share, _shown(examples[reason])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"  {reason:<{widths[0]}}  {count:>{widths[1]}}  {share:>{widths[2]}}  {key}"
        for reason, count, share, key in rows
    )


def read_rejects(directory: str | Path, name: str = "") -> Counter[str]:
    """Counts the rejected samples of a run by reason.

    A sample counts once, regardless of how many epochs, workers or restarts rejected it.

    Args:
        directory: The folder given to `RejectLog`.
        name: Prefix of the names of the loaders to count, e.g. `train`.

    Returns:
        Reason -> number of samples.
    """
    return Counter(read_reasons(directory, name).values())


def read_reasons(directory: str | Path, name: str = "") -> dict[tuple[str, str], str]:
    """Returns (split, key) -> reason of each rejected sample, with the arguments of `read_rejects`."""
    reasons: dict[tuple[str, str], str] = {}
    for path in sorted(Path(directory).glob(f"{name}*-worker*.jsonl")):
        split = path.name.split("-", 1)[0]
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            reject = json.loads(line)
            reasons[split, reject["key"]] = reject["reason"]
    return reasons
