# SPDX-License-Identifier: Apache-2.0
"""What became of the records that were prepared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_smar.data.fields import counted


@dataclass
class SplitReport:
    """What became of one split's records.

    Attributes:
        kept: Samples in the shards.
        images: Images in the shards.
        trimmed: Samples from which a turn was removed: an answer without a question, or a question without an answer.
        unread: Key that is not read and not known -> number of samples in which it is not empty.
        rejected: Reason -> number of records that were skipped.
    """

    kept: int = 0
    images: int = 0
    trimmed: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> SplitReport:
        """Restores a report from JSON."""
        counters = {name: Counter(report[name]) for name in ("unread", "rejected")}
        return cls(**{**report, **counters})

    def add(self, note: Mapping[str, Any]) -> None:
        """Adds the counts of one shard's records, as `write_shard` wrote them."""
        self.kept += note["kept"]
        self.images += note["images"]
        self.trimmed += note["trimmed"]
        self.unread.update(note["unread"])
        self.rejected.update(reject["reason"] for reject in note["rejected"])


def format_report(reports: Mapping[str, SplitReport]) -> str:
    """Returns a table of the kept and, by reason, the skipped records, followed by the keys that were not read."""
    reasons = sorted({reason for report in reports.values() for reason in report.rejected})
    rows = [["split", "kept", "images", "trimmed", "left out", *reasons]]
    for split, report in reports.items():
        counts = [report.kept, report.images, report.trimmed, report.rejected.total()]
        rows.append([split, *(f"{count:,}" for count in [*counts, *(report.rejected[reason] for reason in reasons)])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    unread: Counter[str] = sum((report.unread for report in reports.values()), Counter())
    if unread:
        names = ", ".join(f"`{key}` in {counted(count, 'sample')}" for key, count in unread.most_common(20))
        names += f" and {len(unread) - 20} more keys" if len(unread) > 20 else ""
        lines.append(f"Keys that were not read: {names}")
    return "\n".join(lines)
