# SPDX-License-Identifier: Apache-2.0
"""The log of the samples that a run was trained on, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_smar.data.batch import VisionLanguageBatch


class RecordedSamples:
    """Passes micro-batches through and logs their keys in `DIRECTORY/rank000.jsonl` (by data-parallel rank).

    Each micro-batch gives a line `{"step": 7, "keys": [...]}`. On resume, the entries after the checkpoint's step are
    deleted, so that the log always matches what the model was trained on.

    Args:
        iterator: Iterator over the training loader.
        directory: Folder of the files; created if it does not exist.
        rank: This rank's index among the ranks that read different samples.
        size: Number of ranks that read different samples.
        steps_done: Step of the checkpoint that was loaded; 0 at the start.
        current_step: Returns the number of the current step, from 1.
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
        self.iterator = iterator
        self._current_step = current_step
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("rank*.jsonl"):
            # The files of ranks that this run does not have are divided among its ranks.
            if int(path.stem.removeprefix("rank")) % size == rank:
                _keep_steps(path, steps_done)
        # Line-buffered, so that a killed run leaves a complete log.
        self._file = (folder / f"rank{rank:03d}.jsonl").open("a", encoding="utf-8", buffering=1)

    def __iter__(self) -> RecordedSamples:
        """Returns this iterator."""
        return self

    def __next__(self) -> VisionLanguageBatch:
        """Returns the next micro-batch, after logging it."""
        batch = next(self.iterator)
        line = json.dumps({"step": self._current_step(), "keys": list(batch.__key__)}, ensure_ascii=False)
        self._file.write(line + "\n")
        return batch

    def save_state(self) -> dict[str, Any]:
        """Returns the loader's state."""
        return self.iterator.save_state()  # type: ignore[attr-defined]


def read_recorded(directory: str | Path) -> dict[int, dict[int, list[list[str]]]]:
    """Reads the log of `RecordedSamples`, also while it is being written: an incomplete last line is ignored.

    Returns:
        Step -> data-parallel rank -> the keys of each of the rank's micro-batches.
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
    """Truncates a file after step `last`; its lines are ordered by step, and its last line may be incomplete."""
    with path.open("r+b") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last:
                break
            end += len(line)
        file.truncate(end)
