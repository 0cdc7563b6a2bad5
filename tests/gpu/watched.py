# SPDX-License-Identifier: Apache-2.0
"""Runs pretrain_vlm.py with the same flags, and records every step: `watched.py RECORD FLAGS...`.

Megatron's console shows only seven digits of a loss, and TensorBoard may not be installed. The record is a JSON file:
by step (from 1) every loss, the gradient norm and the seconds; the seconds of every save; the peak memory.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pretrain_vlm  # first: it prepares Megatron for the device

# isort: split
import torch
from megatron.training import get_args, training

# By torch's default, float32 convolutions (the tower's patches) are rounded to 10 bits on the GPU only.
torch.backends.cudnn.allow_tf32 = False


class Record:
    """Records steps and saves, by wrapping the functions that Megatron's training loop calls."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.saves: list[float] = []

    def watch(self) -> None:
        """Wraps Megatron's functions for a step and a save."""
        training.train_step = self._timed_step(training.train_step)
        training.save_checkpoint_and_time = self._timed_save(training.save_checkpoint_and_time)

    def _timed_step(self, train_step: Any) -> Any:
        @functools.wraps(train_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = train_step(*args, **kwargs)
            torch.cuda.synchronize()
            losses, norm = result[0], result[5]
            values = {name: float(loss) for name, loss in losses.items()} | {"grad-norm": float(norm or 0)}
            self.steps[get_args().curr_iteration + 1] = values | {"seconds": time.perf_counter() - begin}
            return result

        return step

    def _timed_save(self, save: Any) -> Any:
        @functools.wraps(save)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = save(*args, **kwargs)
            self.saves.append(time.perf_counter() - begin)
            return result

        return timed

    def write(self, path: Path) -> None:
        """Writes the record."""
        peak = torch.cuda.max_memory_allocated()
        path.write_text(json.dumps({"steps": self.steps, "saves": self.saves, "peak_bytes": peak}), encoding="utf-8")


def main() -> None:
    """Trains like pretrain_vlm.py and writes the record."""
    path = Path(sys.argv.pop(1))
    record = Record()
    record.watch()
    try:
        pretrain_vlm.main()
    finally:
        record.write(path)


if __name__ == "__main__":
    main()
