# SPDX-License-Identifier: Apache-2.0
"""Which samples a step has read: kept for the last steps, for what is said about a step that stands out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_smar.runtime.progress import DATA, section

_KEPT_STEPS = 3  # a loss is read one step later
_SHOWN = 16  # keys in a line; all of them are in the file


class WatchedSamples:
    """Passes micro-batches through, marks the time in which they are read, and keeps the keys of the last steps.

    Args:
        iterator: Iterator over a loader of micro-batches.
        current_step: Returns the number of the current step, from 1; None keeps no keys.
    """

    def __init__(self, iterator: Iterator[Any], current_step: Callable[[], int] | None = None) -> None:
        self.iterator = iterator
        self._current_step = current_step
        self._keys: dict[int, list[str]] = {}

    def __iter__(self) -> WatchedSamples:
        """Returns this iterator."""
        return self

    def __next__(self) -> Any:
        """Returns the next micro-batch."""
        with section(DATA):
            batch = next(self.iterator)
        if self._current_step is not None:
            step = self._current_step()
            self._keys.setdefault(step, []).extend(map(str, batch.__key__))
            for old in [number for number in self._keys if number <= step - _KEPT_STEPS]:
                del self._keys[old]
        return batch

    def keys_of(self, step: int) -> list[str]:
        """Returns the keys of the samples that this rank has read for a step; empty if they are not kept."""
        return list(self._keys.get(step, []))

    def save_state(self) -> Any:
        """Returns the loader's state."""
        return self.iterator.save_state()  # type: ignore[attr-defined]


def gathered(keys: list[str], group: dist.ProcessGroup) -> list[list[str]]:
    """Returns the keys of every rank of a group, by rank; all of its ranks must call this."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(found, keys, group=group)
    return found


def describe(keys: Sequence[Sequence[str]], file: Path | None) -> str:
    """Returns the samples of a step as text, and writes them to a file if a line cannot show them all.

    Args:
        keys: Keys of the samples, by data-parallel rank.
        file: The file; None if the run saves nothing, and the line shows what it can.
    """
    number = sum(map(len, keys))
    where = ""
    if number > _SHOWN and file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"rank": rank, "keys": list(own)}, ensure_ascii=False) for rank, own in enumerate(keys)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        where = f"; all {number} in {file}"
    left, shown = _SHOWN, []
    for rank, own in enumerate(keys):
        if own and left:
            shown.append(f"data-parallel rank {rank}: {', '.join(own[:left])}")
            left -= len(own[:left])
    more = ", ..." if number > _SHOWN else ""
    return ("; ".join(shown) + more + where) or "not known"
