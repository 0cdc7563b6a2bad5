# SPDX-License-Identifier: Apache-2.0
"""Logs a step whose loss is far above those before it, with the samples that it has read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_smar.reliability.step_samples import describe, gathered

WINDOW = 100


class Spike(NamedTuple):
    """A loss that stands out, and the mean and standard deviation of the steps before it."""

    loss: float
    mean: float
    deviation: float


class SpikeFinder:
    """Compares each loss with those of the 100 steps before it.

    Args:
        sigma: Number of standard deviations above the mean from which on a loss is a spike.
    """

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> Spike | None:
        """Adds the loss of a step; returns it if it is a spike. A loss that is not finite is left out."""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self._losses) == WINDOW:
            mean = math.fsum(self._losses) / WINDOW
            deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in self._losses) / WINDOW)
            # Equal losses have no deviation, and then rounding is no spike.
            if loss > mean + max(self._sigma * deviation, 1e-6 * abs(mean)):
                spike = Spike(loss, mean, deviation)
        self._losses.append(loss)
        return spike


class LossSpikes:
    """Reports spikes of a run's loss; called after each step on every rank.

    The loss of a step is read after the next step, when the device has computed it long ago, so that no rank waits.

    Args:
        sigma: See `SpikeFinder`.
        name: Which of Megatron's losses.
        keys_of: Returns the keys of this rank's samples of a step.
        group: The ranks that read different samples.
        reports: Whether this rank writes the line; one of the ranks with the loss.
        folder: Folder for the keys; None if the run saves nothing.
        last_step: Number of the run's last step.
    """

    def __init__(
        self,
        sigma: float,
        name: str,
        keys_of: Callable[[int], list[str]],
        group: dist.ProcessGroup,
        reports: bool,
        folder: Path | None,
        last_step: int | None = None,
    ) -> None:
        self._finder = SpikeFinder(sigma)
        self._name, self._keys_of, self._group = name, keys_of, group
        self._reports, self._folder, self._last_step = reports, folder, last_step
        self._last: tuple[int, Tensor, list[str]] | None = None

    def __call__(self, step: int, losses: dict[str, Any], skipped: bool) -> None:
        """Looks at the loss of the step before, and keeps that of this step."""
        self.finish()
        # Only the last pipeline stage has losses, the same on all its ranks.
        if not skipped and self._name in losses:
            loss = losses[self._name].detach()
            copy = torch.empty(loss.shape, dtype=loss.dtype).pin_memory()
            self._last = step, copy.copy_(loss, non_blocking=True), self._keys_of(step)
        if step == self._last_step:
            torch.cuda.synchronize()
            self.finish()

    def finish(self) -> None:
        """Looks at the loss that was kept."""
        last, self._last = self._last, None
        spike = self._finder.add(float(last[1])) if last is not None else None
        if last is None or spike is None:
            return
        step, _, own = last
        keys = gathered(own, self._group)
        if self._reports:
            print(self._line(step, spike, keys), flush=True)

    def _line(self, step: int, spike: Spike, keys: list[list[str]]) -> str:
        above = (spike.loss - spike.mean) / spike.deviation if spike.deviation else math.inf
        file = self._folder / f"step_{step:08d}.jsonl" if self._folder is not None else None
        return (
            f"WARNING: iteration {step}: its {self._name}, {spike.loss:.4f}, is {above:.1f} standard deviations above "
            f"the mean of the {WINDOW} steps before it ({spike.mean:.4f}, deviation {spike.deviation:.4f}); "
            f"its samples: {describe(keys, file)}"
        )
