# SPDX-License-Identifier: Apache-2.0
"""Where this rank is in its run, and since when: the sections of a step, and the waiting for other ranks in them.

`reliability.hangs` reads this from another thread, and `reliability.stragglers` sums up the seconds by section. Only
the main thread enters sections; every other thread may call `beat`.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from megatron_smar.runtime.adaptation import Where, adaptation
from megatron_smar.runtime.environment import Device

START = "the start"
DATA = "the data loader"
PASS = "the forward and backward pass"
OPTIMIZER = "the optimizer's step"
SAVE = "a save"
LOAD = "the loading of a checkpoint"
EVALUATION = "the evaluation"
BETWEEN = "the loop between two steps"
END = "the end of the run"
# Sections in which reading or writing files is progress.
FILES = frozenset({START, SAVE, LOAD})

AfterStep = Callable[[int, dict[str, Any], bool], None]


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        section: One of the constants of this module.
        waits: Whether it waits there for other ranks, in a collective or for a message.
    """

    section: str = START
    waits: bool = False


class Progress:
    """This rank's place in its run.

    Attributes:
        place: Where the rank is now.
        moved: When it last made progress, by `time.monotonic`.
        step: Number of the present step, or of the last one; 0 before the first.
        steps: Number of training steps that this process has completed.
        seconds: Seconds spent by section since the last `take_seconds`, without waiting for other ranks.
        after_step: Called after each training step with its number, Megatron's losses, and whether it was skipped.
    """

    def __init__(self) -> None:
        self.place = Place()
        self.moved = self._entered = time.monotonic()
        self.step = self.steps = 0
        self.seconds: dict[str, float] = {}
        self.after_step: list[AfterStep] = []

    def beat(self) -> None:
        """Notes that this rank makes progress."""
        self.moved = time.monotonic()

    def go(self, place: Place) -> None:
        """Notes that this rank goes to another place, which is progress."""
        now = time.monotonic()
        if not self.place.waits:
            section = self.place.section
            self.seconds[section] = self.seconds.get(section, 0.0) + now - self._entered
        self.place, self.moved, self._entered = place, now, now

    def take_seconds(self) -> dict[str, float]:
        """Returns the seconds by section since the last call."""
        self.go(self.place)
        seconds, self.seconds = self.seconds, {}
        return seconds


PROGRESS = Progress()


class section:
    """Marks a section of the run while it is entered; sections may be nested. It is cheaper than a generator.

    Args:
        name: One of the constants of this module; None for the present section.
        waits: Whether the rank waits for other ranks.
    """

    def __init__(self, name: str | None, waits: bool = False) -> None:
        self._name, self._waits = name, waits
        self._before: Place | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = PROGRESS.place
            PROGRESS.go(Place(self._name or self._before.section, self._waits))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        if self._before is not None:
            PROGRESS.go(self._before)


def comparable_sections(device: Device) -> tuple[str, ...]:
    """Returns the sections whose seconds on the host say how fast a rank itself is.

    On CUDA the host only queues the work of a pass, and waits for it wherever a value is read.
    """
    return (DATA, PASS, OPTIMIZER) if device == "cpu" else (DATA,)


def _within(function: Any, name: str) -> Any:
    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with section(name):
            return function(*args, **kwargs)

    return marked


@adaptation(
    "Megatron's loop reports its sections only to NVIDIA's fault-tolerance package, and has no hook after a step",
    Where.ANYWHERE,
)
def mark_the_sections_of_a_run() -> None:
    """Marks steps, optimizer, saves, loading and evaluation as sections, and calls `after_step` after each step."""
    import megatron.training.training as training
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    train_step, train = training.train_step, training.train

    @functools.wraps(train_step)
    def marked_step(*args: Any, **kwargs: Any) -> Any:
        PROGRESS.step = int(training.get_args().curr_iteration) + 1
        with section(PASS):
            done = train_step(*args, **kwargs)
        PROGRESS.steps += 1
        for call in PROGRESS.after_step:
            call(PROGRESS.step, done[0], bool(done[1]))
        return done

    @functools.wraps(train)
    def marked_training(*args: Any, **kwargs: Any) -> Any:
        PROGRESS.go(Place(BETWEEN))
        try:
            return train(*args, **kwargs)
        finally:
            PROGRESS.go(Place(END))

    training.train_step, training.train = marked_step, marked_training
    training.load_checkpoint = _within(training.load_checkpoint, LOAD)
    training.save_checkpoint_and_time = _within(training.save_checkpoint_and_time, SAVE)
    training.maybe_finalize_async_save = _within(training.maybe_finalize_async_save, SAVE)
    training.evaluate_and_print_results = _within(training.evaluate_and_print_results, EVALUATION)
    ChainedOptimizer.step = _within(ChainedOptimizer.step, OPTIMIZER)


@adaptation(
    "with Gloo a rank waits for the others inside its collectives: nothing else tells a rank that waits from the one "
    "it waits for",
    Where.CPU,
    needed_by="torch 2.11 to 2.13",
)
def mark_waiting_for_other_ranks() -> None:
    """Marks the time in which a rank waits for a collective or a message."""
    from torch._C._distributed_c10d import Work

    wait = Work.wait

    def marked_wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        with section(None, waits=True):
            return wait(self, *args, **kwargs)

    Work.wait = marked_wait  # type: ignore[method-assign]


ADAPTATIONS = (mark_the_sections_of_a_run, mark_waiting_for_other_ranks)
