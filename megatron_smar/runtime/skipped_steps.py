# SPDX-License-Identifier: Apache-2.0
"""How many steps that are not finite a run may skip, and what such a step must leave unchanged.

`finite_steps` keeps a faulty step from being applied, before the optimizer has changed a weight or a moment. What the
forward and backward passes have changed by then are buffers, such as the biases of Megatron's routers, and the sums
that a routing strategy accumulates: they are put back here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _nothing() -> None:
    pass


class Skips:
    """What the program says about steps that are not finite; without it, none is skipped.

    Attributes:
        allowed: How many may be skipped in the whole run.
        done: Those that were; saved with the run's arguments.
        settle: Called before each step: applies what is left to do of the step before it.
        discard: Called after a skipped step: forgets what was accumulated in it.
        keys_of: Returns the keys of this rank's samples of a step.
        describe: Returns text about the keys of a step's samples, by data-parallel rank.
    """

    def __init__(self) -> None:
        self.allowed = 0
        self.done: list[int] = []
        self.settle: Callable[[], None] = _nothing
        self.discard: Callable[[], None] = _nothing
        self.keys_of: Callable[[int], list[str]] = lambda step: []
        self.describe: Callable[[int, Sequence[Sequence[str]]], str] = lambda step, keys: "not known"
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def left(self) -> int:
        """How many more steps may be skipped."""
        return self.allowed - len(self.done)

    @torch.no_grad()
    def begin(self, model: list[torch.nn.Module]) -> None:
        """Remembers what a step may change before it is found to be faulty; only if it could be skipped."""
        self._buffers = []
        if self.left > 0:
            self.settle()
            self._buffers = [(buffer, buffer.clone()) for chunk in model for _, buffer in chunk.named_buffers()]

    @torch.no_grad()
    def skip(self, step: int) -> None:
        """Counts a skipped step, and puts back what it has changed."""
        self.done.append(step)
        for buffer, before in self._buffers:
            buffer.copy_(before)
        self.discard()

    def exhausted(self) -> str:
        """Returns why no step is skipped any more, "" if none ever was to be."""
        number = f"{len(self.done)} step{'s have' if len(self.done) > 1 else ' has'}"
        return f"{number} been skipped already (--max-skipped-steps {self.allowed})" if self.allowed else ""


SKIPS = Skips()
