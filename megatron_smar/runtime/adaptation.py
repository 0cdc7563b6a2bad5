# SPDX-License-Identifier: Apache-2.0
"""Adaptations: named functions that each patch one thing in another package, once, where the reason for it holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from megatron_smar.runtime.environment import Environment

_INSTALLED: list[Adaptation] = []


class Where(Enum):
    """The environments in which the reason for an adaptation holds."""

    ANYWHERE = "on every device"
    CPU = "on the CPU"
    CUDA = "on CUDA"
    TORCH_ADAM = "without Transformer Engine and apex, on every device"

    def holds(self, environment: Environment) -> bool:
        """Returns whether the reason holds in this environment."""
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
        name: Name of the function that makes the change.
        reason: Why the change is needed, in one line.
        where: Environments in which that reason holds.
        needed_by: Release of the patched package that needs the change.
    """

    name: str
    reason: str
    where: Where
    needed_by: str


def adaptation(
    reason: str, where: Where, needed_by: str = "megatron-core 0.19.2"
) -> Callable[[Callable[[], None]], Callable[[Environment], None]]:
    """Turns a function into an adaptation, which runs at most once per process, only where its reason holds.

    Adaptations that have run are listed by `adaptations()`.

    Args:
        reason: Why the change is needed, in one line.
        where: Environments in which that reason holds.
        needed_by: Release of the patched package that needs the change.
    """

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
    """Returns the adaptations that were applied in this process."""
    return tuple(_INSTALLED)
