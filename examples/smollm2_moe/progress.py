# SPDX-License-Identifier: Apache-2.0
"""The time left of a series of steps, from expected durations and from what the steps so far took, and its log."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_smar.report.numbers import duration

OTHER = "other"


def expected(name: str, seconds: Mapping[str, float]) -> float:
    """Returns a step's expected duration: that of its name, or of its kind (the name up to `_` or a digit)."""
    kind = name.split("_")[0]
    for key in (name, kind, kind.rstrip("0123456789")):
        if key in seconds:
            return seconds[key]
    return seconds.get(OTHER, 0.0)


class Progress:
    """Tells before each step which it is and how long the rest may take.

    Args:
        names: Names of all steps, in order.
        seconds: Expected durations in seconds, by a step's name or kind.
        log: File to which every line is appended, with the time.
    """

    def __init__(self, names: Sequence[str], seconds: Mapping[str, float], log: Path) -> None:
        self._names, self._log = list(names), log
        self._expected = {name: expected(name, seconds) for name in names}
        self._measured: dict[str, float] = {}

    def left(self, name: str) -> float:
        """Returns the expected seconds from the start of a step to the end of the last.

        Expected durations are scaled by what the steps so far took, compared with their own expected durations; the
        first tenth of the whole counts as if it had taken what was expected.
        """
        rest = sum(self._expected[other] for other in self._names[self._names.index(name) :])
        prior = sum(self._expected.values()) / 10
        planned = prior + sum(self._expected[done] for done in self._measured)
        return rest * (prior + sum(self._measured.values())) / planned if planned else rest

    def begin(self, name: str) -> None:
        """Says that a step begins."""
        number = self._names.index(name) + 1
        self._say(f"step {number} of {len(self._names)}, {name}; about {duration(self.left(name))} left for all")

    def end(self, name: str, seconds: float) -> None:
        """Says that a step is done.

        Args:
            name: The step.
            seconds: What it took.
        """
        self._measured[name] = seconds
        self._say(f"{name} done in {duration(seconds)}")

    def _say(self, text: str) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        print(f"\n{text}" if text.startswith("step") else text, flush=True)
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
