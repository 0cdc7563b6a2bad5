# SPDX-License-Identifier: Apache-2.0
"""Which samples a run has seen, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_smar.data.batch import VisionLanguageBatch


class RecordedSamples:
    """Writes the keys of each micro-batch that it passes on to `DIRECTORY/rank000.jsonl` (the data-parallel rank).

    A line is `{"step": 7, "keys": [...]}`, one per micro-batch. A run that goes on from a checkpoint first takes back
    the steps behind it, which the model has forgotten: the files always tell what the model has learned from.

    Args:
        iterator: The training loader's.
        directory: Folder of the files; made if it is not there.
        rank: This rank's index among those that read different samples.
        size: Their number.
        steps_done: Steps of the checkpoint that was loaded; 0 at the start.
        current_step: Gives the number of the step, from 1, that reads now.
    """

    def __init__(
        self,
        iterator: Iterator[VisionLanguageBatch],
        directory: str | Path,
        rank: int,
        size: int,
        steps_done: int,
        current_step: Callable[[], int],
    ) -> None:
        """Takes back what lies behind the checkpoint, and open the file."""
        self.iterator = iterator
        self._current_step = current_step
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("rank*.jsonl"):
            # Files of ranks that this run does not have are divided among those that it has.
            if int(path.stem.removeprefix("rank")) % size == rank:
                _keep_steps(path, steps_done)
        # Line by line, so that a killed run leaves all that it has read.
        self._file = (folder / f"rank{rank:03d}.jsonl").open("a", encoding="utf-8", buffering=1)

    def __iter__(self) -> RecordedSamples:
        """Returns itself."""
        return self

    def __next__(self) -> VisionLanguageBatch:
        """Returns the next micro-batch, recorded."""
        batch = next(self.iterator)
        line = json.dumps({"step": self._current_step(), "keys": list(batch.__key__)}, ensure_ascii=False)
        self._file.write(line + "\n")
        return batch

    def save_state(self) -> dict[str, Any]:
        """Returns the loader's state."""
        return self.iterator.save_state()  # type: ignore[attr-defined]


def read_recorded(directory: str | Path) -> dict[int, dict[int, list[list[str]]]]:
    """Reads what `RecordedSamples` wrote, or is writing: half a line at the end is left out.

    Returns:
        step -> data-parallel rank -> the keys of each of its micro-batches.
    """
    steps: dict[int, dict[int, list[list[str]]]] = {}
    for path in sorted(Path(directory).glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            entry = json.loads(line)
            steps.setdefault(entry["step"], {}).setdefault(rank, []).append(entry["keys"])
    return steps


def _keep_steps(path: Path, last: int) -> None:
    """Cuts a file behind step `last`; its lines are in the order of the steps, and the last may be half a line."""
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last:
                break
            end += len(line)
        file.truncate(end)
