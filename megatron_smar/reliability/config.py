# SPDX-License-Identifier: Apache-2.0
"""The config of everything that keeps a run alive, or ends it in time."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import Field, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class ReliabilityConfig:
    """The config of everything that keeps a run alive, or ends it in time; docs/reliability.md.

    Attributes:
        verify_checkpoint: How much of a checkpoint's files is compared with its manifest before it is loaded: full,
            every byte; sampled, sizes and a few blocks of each file; none, sizes only. A run takes the newest
            checkpoint that passes.
        keep_last: How many of the newest checkpoints to keep in --save; older ones are deleted, except those of
            --keep-every. None keeps all.
        keep_every: Steps between checkpoints in --save that --keep-last never deletes.
        max_failed_saves: Stop when this many saves in a row have failed, on a full disk for example; until then
            training continues and tries again at the next save.
        hang_seconds: End the run, with the stacks of all ranks, when a rank is stuck for this long in a step, a save or
            the data; 0 never.
        hang_seconds_first_step: The same until the first step is complete: kernels are compiled, files are opened.
        max_skipped_steps: Skip this many steps, in a whole run, whose loss or gradient is NaN or infinite, instead of
            stopping at the first.
        loss_spike_sigma: Log the samples of a step whose loss is this many standard deviations above the mean of the
            100 steps before it; 0 never.
    """

    verify_checkpoint: Literal["full", "sampled", "none"] = "full"
    keep_last: int | None = None
    keep_every: int | None = None
    max_failed_saves: int = 3
    hang_seconds: float = 600.0
    hang_seconds_first_step: float = 1800.0
    max_skipped_steps: int = 0
    loss_spike_sigma: float = 6.0

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every", "max_failed_saves"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{self.flag(name)} is {value}; give 1 or more.")
        for name in ("hang_seconds", "hang_seconds_first_step", "max_skipped_steps", "loss_spike_sigma"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{self.flag(name)} is {value}; give 0 or more.")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("--keep-every has no effect without --keep-last, which says what is deleted; give both.")

    @classmethod
    def flag_fields(cls) -> list[Field[Any]]:
        """Returns the fields that are flags: all."""
        return list(fields(cls))

    @classmethod
    def flag(cls, field: str) -> str:
        """Returns the flag of a field."""
        return f"--{field}".replace("_", "-")

    @classmethod
    def from_arguments(cls, args: Namespace) -> ReliabilityConfig:
        """Builds the config from parsed flags."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})
