# SPDX-License-Identifier: Apache-2.0
"""Samples that cannot be used: why, which ones, and how many of them there were."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils.data import get_worker_info

FEWEST_JUDGED = 100  # samples of a worker before their share of rejects says anything


class SampleError(ValueError):
    """One sample that cannot be used.

    Args:
        reason: Short slug by which such samples are counted, e.g. `image_count_mismatch`.
        message: What is wrong with this sample.
    """

    def __init__(self, reason: str, message: str) -> None:
        """Keeps the two parts; `str()` gives `reason: message`."""
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        """Returns `reason: message`."""
        return f"{self.reason}: {self.message}"


class DataError(RuntimeError):
    """The data as a whole cannot be used; the message is one sentence for the user."""


@dataclass
class RejectLog:
    """Names every rejected sample once on standard error and in a file, and stops when there are too many.

    One object serves one loader. Worker processes inherit copies of it; each counts for itself and writes a file of its
    own. Ranks that read the same samples count the same, and so stop at the same sample.

    Attributes:
        name: Which loader this is; the files are called `{name}-worker{i}.jsonl`.
        source: Where the samples come from, for messages.
        directory: Folder of the files; None writes none.
        limit: This many rejected samples in a row end the run.
        announce: Whether this process prints and writes; False on all but one rank of those that read the same samples.
        max_skip_ratio: A larger share of rejects ends the run, judged from `FEWEST_JUDGED` samples on and with three
            standard deviations to spare, so that bad luck of one worker among hundreds does not end it; 1 ends none.
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
            key: Its key.
            error: What is wrong with it.
            late: It had been accepted at first, and this came out when its images were decoded.

        Raises:
            DataError: `limit` samples in a row have been rejected, or more than the share of `max_skip_ratio`.
        """
        if self.announce and key not in self._seen:
            self._seen.add(key)
            print(f"skipped sample {_shown(key)}: {error}", file=sys.stderr, flush=True)
            self._write(key, error)
        self._rejected[error.reason] += 1
        self._examples.setdefault(error.reason, key)
        self._in_a_row[late] += 1
        if late:
            self._accepted = max(0, self._accepted - 1)  # a resumed run has not counted what it had in its buffers
        self._check(key, error)

    def accept(self, *, late: bool = False) -> None:
        """Notes that a sample is good, or with `late` that its images are, so that the row of rejects ends."""
        self._accepted += not late
        self._in_a_row[late] = 0

    def _check(self, key: str, error: SampleError) -> None:
        total = self._accepted + self._rejected.total()
        share, ratio = self._rejected.total() / total, self.max_skip_ratio
        mend = "mend the data, or the settings it was rejected for"
        if max(self._in_a_row.values()) >= self.limit:
            what = f"The last {self.limit} samples in a row from {self.source} were rejected"
            mend = f"(the last was {_shown(key)}: {error.message}): {mend}"
        elif total >= FEWEST_JUDGED and share > ratio + 3 * math.sqrt(ratio * (1 - ratio) / total):
            what = f"{share:.1%} of the first {total} samples that a worker read from {self.source} were rejected"
            mend = f"and --max-skip-ratio is {ratio}: {mend}, or raise it"
        else:
            return
        raise DataError(f"{what} {mend}.\n{format_rejects(self._rejected, self._examples, total)}")

    def _write(self, key: str, error: SampleError) -> None:
        if self.directory is None:
            return
        worker = get_worker_info()
        path = Path(self.directory) / f"{self.name}-worker{worker.id if worker else 0:02d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "reason": error.reason, "message": error.message}, ensure_ascii=False)
        # A member's name that is not UTF-8 holds surrogates: with a backslash each is the escape that JSON has for it.
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def _shown(key: str) -> str:
    """A key for the terminal: it comes from the archive, and may hold control characters."""
    return key if key.isprintable() else ascii(key)


def format_rejects(rejected: Mapping[str, int], examples: Mapping[str, str], total: int | None = None) -> str:
    """Writes a table of rejects, the most frequent reason first.

    Args:
        rejected: Reason -> number of samples.
        examples: Reason -> key of one of them.
        total: Number of samples that were read; None leaves the shares out.
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

    A sample counts once, however many epochs, workers or restarts rejected it.

    Args:
        directory: The folder given to `RejectLog`.
        name: Only the loaders whose name begins so, e.g. `train`.

    Returns:
        reason -> number of samples.
    """
    return Counter(read_reasons(directory, name).values())


def read_reasons(directory: str | Path, name: str = "") -> dict[tuple[str, str], str]:
    """Returns (split, key) -> reason of each rejected sample; the arguments are `read_rejects`'s."""
    reasons: dict[tuple[str, str], str] = {}
    for path in sorted(Path(directory).glob(f"{name}*-worker*.jsonl")):
        split = path.name.split("-", 1)[0]
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            reject = json.loads(line)
            reasons[split, reject["key"]] = reject["reason"]
    return reasons
