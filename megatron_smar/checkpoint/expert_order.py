# SPDX-License-Identifier: Apache-2.0
"""The record, in a checkpoint's arguments, of where expert placement moved the experts (docs/placement.md).

The record travels with the weights: a run that loads a placed checkpoint saves it with each of its own. It says, for
each MoE layer, which number the expert at each place had at first; so placements compose, and can be undone.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_smar.checkpoint.fit import CheckpointMismatchError, checkpoint_to_load
from megatron_smar.checkpoint.metadata import read_common_state, read_contents, saved_arguments

_ARGUMENT = "expert_order"

Orders = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class ExpertOrder:
    """Where the experts of a checkpoint are.

    Attributes:
        layers: For each MoE layer, by its number from 1, the first number of the expert that now has number 0, 1, ...
        devices: Number of expert-parallel ranks of the last placement.
        settings: First values of the arguments that name experts by number, by argument; they were renumbered too.
    """

    layers: dict[int, list[int]]
    devices: int
    settings: dict[str, Any] = field(default_factory=dict)


def recorded(args: Any) -> ExpertOrder | None:
    """Returns the record in a run's arguments; None where no expert was moved."""
    content = getattr(args, _ARGUMENT, None)
    return ExpertOrder(**content) if content else None


def record(args: Namespace, order: ExpertOrder | None) -> None:
    """Writes the record into a run's arguments, or removes it."""
    if order is not None:
        setattr(args, _ARGUMENT, asdict(order))
    elif hasattr(args, _ARGUMENT):
        delattr(args, _ARGUMENT)


def keep_expert_order(args: Namespace) -> None:
    """Takes over the record of the checkpoint that a run loads, so that the run's own checkpoints have it.

    Args:
        args: The run's validated arguments.

    Raises:
        CheckpointMismatchError: A flag names experts by other numbers than they have in the checkpoint.
    """
    folder = checkpoint_to_load(args)
    if folder is None:
        return
    saved = saved_arguments(read_common_state(folder, read_contents(folder)))
    order = recorded(saved)
    record(args, order)
    if order is None or args.modality_routing != saved.modality_routing:
        return
    for name in order.settings:
        was, now = getattr(saved, name), getattr(args, name)
        if list(was) != list(now):
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointMismatchError(
                f"--load {args.load or args.pretrained_checkpoint} has its experts placed for {order.devices} devices "
                f"(docs/placement.md), which gave them other numbers: give {flag} {' '.join(was)} instead of "
                f"{' '.join(now) or 'its default'}, or undo the placement."
            )


def describe_placement(args: Any) -> str:
    """Returns a phrase for `inspect`; empty where no expert was moved."""
    order = recorded(args)
    if order is None:
        return ""
    moved = sum(number != place for layer in order.layers.values() for place, number in enumerate(layer))
    experts = sum(map(len, order.layers.values()))
    return f"for {order.devices} devices: {moved} of {experts} experts of {len(order.layers)} layers were moved"
