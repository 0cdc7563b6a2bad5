# SPDX-License-Identifier: Apache-2.0
"""Lets the trainer say how many floating-point operations a step has, where Megatron would estimate them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_smar.runtime.adaptation import Where, adaptation


@dataclass
class Hook:
    """What the trainer fills.

    Attributes:
        step_operations: Returns the operations of the last step, over all replicas; None for Megatron's estimate.
    """

    step_operations: Callable[[], float] | None = None


HOOK = Hook()


@adaptation(
    "--log-throughput and --log-progress count every sequence as --seq-length tokens of text, without pictures",
    Where.ANYWHERE,
)
def count_operations_through_hook() -> None:
    """Makes Megatron's loop take a step's operations from `HOOK`."""
    import megatron.training.training as training

    estimate = training.num_floating_point_operations

    @functools.wraps(estimate)
    def counted(*args: Any, **kwargs: Any) -> float:
        return float(estimate(*args, **kwargs)) if HOOK.step_operations is None else HOOK.step_operations()

    training.num_floating_point_operations = counted


ADAPTATIONS = (count_operations_through_hook,)
