# SPDX-License-Identifier: Apache-2.0
"""Logs a rank that is slower than the others in a part of the step, without the time in which it waits for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_smar.runtime.progress import PROGRESS

RATIO = 1.3
_SHARE = 0.05  # of a step that a difference must be worth
_STEPS = 10  # over which at least the seconds are averaged


class Stragglers:
    """Compares the ranks after every log interval; called after each step on every rank.

    Args:
        log_interval: Steps between two comparisons, or a multiple of it that is 10 steps or more.
        sections: Parts of a step (`runtime.progress`).
        stage: This rank's pipeline stage: ranks of different stages have different work.
    """

    def __init__(self, log_interval: int, sections: Sequence[str], stage: int) -> None:
        self._log_interval, self._sections, self._stage = log_interval, sections, stage
        self._steps = -1  # the first step compiles and opens files

    def __call__(self, step: int, losses: dict[str, Any], skipped: bool) -> None:
        """Counts a step, and compares the ranks if it ends an interval."""
        self._steps += 1
        if self._steps == 0:
            PROGRESS.take_seconds()
        if self._steps < _STEPS or step % self._log_interval:
            return
        taken = PROGRESS.take_seconds()
        own = [1000 * taken.get(name, 0.0) / self._steps for name in self._sections]
        self._steps = 0
        values = torch.tensor([self._stage, *own], dtype=torch.float32, device=torch.cuda.current_device())
        every = values.new_empty(dist.get_world_size(), len(values))
        dist.all_gather_into_tensor(every.view(-1), values)
        if dist.get_rank() == len(every) - 1:
            stages, *columns = every.t().tolist()
            times = dict(zip(self._sections, columns, strict=True))
            for line in slow_ranks(times, [int(stage) for stage in stages]):
                print(f"WARNING: iteration {step}: {line}", flush=True)


def slow_ranks(times: Mapping[str, Sequence[float]], stages: Sequence[int]) -> Iterator[str]:
    """Yields a line for each part of the step, and stage, in which one rank stands out.

    Args:
        times: Milliseconds per step by part and rank.
        stages: Pipeline stage of each rank.
    """
    step = max(map(sum, zip(*times.values(), strict=True)))
    for stage in sorted(set(stages)):
        ranks = [rank for rank, own in enumerate(stages) if own == stage]
        for name, values in times.items():
            slowest = max(ranks, key=values.__getitem__)
            others = [values[rank] for rank in ranks if rank != slowest]
            if not others:
                continue
            usual = median(others)
            if values[slowest] > RATIO * usual and values[slowest] - usual > _SHARE * step:
                times_as_long = f"{values[slowest] / usual:.1f} times" if usual else "more than"
                yield (
                    f"rank {slowest} is slow in {name}: {values[slowest]:.1f} ms per step, {times_as_long} the median "
                    f"of the other ranks{f' of pipeline stage {stage}' if max(stages) else ''} ({usual:.1f} ms)"
                )
