# SPDX-License-Identifier: Apache-2.0
"""What an adaptation is: one named function that changes one thing of another package, once, where its reason holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_smar.runtime.environment import Environment

_INSTALLED: list[Adaptation] = []


class Where(Enum):
    """Where the reason of an adaptation holds."""

    ANYWHERE = "on every device"
    CPU = "on the CPU"
    CUDA = "on CUDA"
    TORCH_ADAM = "without Transformer Engine and apex, on every device"

    def holds(self, environment: Environment) -> bool:
        """Whether it holds in an environment."""
        match self:
            case Where.CPU | Where.CUDA:
                return environment.device == self.name.lower()
            case Where.TORCH_ADAM:
                return not environment.fused_adam
            case _:
                return True


@dataclass(frozen=True)
class Adaptation:
    """One change that `install()` makes.

    Attributes:
        name: The function that makes it.
        reason: Why, in a line.
        where: Where that reason holds.
        needed_by: The release that needs it.
    """

    name: str
    reason: str
    where: Where
    needed_by: str


def adaptation(
    reason: str, where: Where, needed_by: str = "megatron-core 0.19.2"
) -> Callable[[Callable[[], None]], Callable[[Environment], None]]:
    """Makes a function an adaptation: it runs at most once in a process, where its reason holds, and is then listed."""

    def decorate(function: Callable[[], None]) -> Callable[[Environment], None]:
        record = Adaptation(function.__name__, reason, where, needed_by)

        @functools.wraps(function)
        def once(environment: Environment) -> None:
            if where.holds(environment) and record not in _INSTALLED:
                function()
                _INSTALLED.append(record)

        return once

    return decorate


def adaptations() -> tuple[Adaptation, ...]:
    """The adaptations in force in this process."""
    return tuple(_INSTALLED)
