# SPDX-License-Identifier: Apache-2.0
"""What an adaptation is: one named function that changes one thing of another package, once, with its reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

_INSTALLED: list[Adaptation] = []


@dataclass(frozen=True)
class Adaptation:
    """One change that `install()` made.

    Attributes:
        name: The function that made it.
        reason: Why, in a line.
        needed_by: The release that needs it.
    """

    name: str
    reason: str
    needed_by: str


def adaptation(
    reason: str, needed_by: str = "megatron-core 0.19.2"
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a function an adaptation: it runs at most once in a process, and is listed by `adaptations()`."""

    def decorate(function: Callable[[], None]) -> Callable[[], None]:
        record = Adaptation(function.__name__, reason, needed_by)

        @functools.wraps(function)
        def once() -> None:
            if record not in _INSTALLED:
                function()
                _INSTALLED.append(record)

        return once

    return decorate


def adaptations() -> tuple[Adaptation, ...]:
    """The adaptations in force in this process; empty on CUDA."""
    return tuple(_INSTALLED)
