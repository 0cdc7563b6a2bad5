# SPDX-License-Identifier: Apache-2.0
"""Groups of experts, as a flag gives them: by number or by share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise


def expert_groups(
    experts: Sequence[str], shares: Mapping[str, float], num_experts: int, flag: str, kind: str
) -> dict[str, list[int]]:
    """Parses a partition of a layer's experts into named groups.

    Args:
        experts: The flag's values: numbers from 0, such as text=0-3 or text=0,2-5, or shares, such as text=0.75, for
            all groups. Shares are laid out in the order of `shares`. Empty for `shares`.
        shares: The default shares by the group's name, which add up to 1.
        num_experts: E, the number of experts.
        flag: The flag, for messages.
        kind: What a group is called in messages.

    Returns:
        The numbers of each group's experts, in the order of `shares`; each expert is in exactly one group.

    Raises:
        ValueError: The values are not a partition of the experts into these groups.
    """
    parts = dict(part.partition("=")[::2] for part in experts) or {name: str(share) for name, share in shares.items()}
    given = f"{flag} {' '.join(experts)}"
    if (experts and len(parts) < len(experts)) or sorted(parts) != sorted(shares):
        example = " ".join(f"{name}={2 * place}-{2 * place + 1}" for place, name in enumerate(shares))
        raise ValueError(f"{given} must name each of {', '.join(shares)} once, as {example}.")
    if all(re.fullmatch(r"\d*\.\d+", text) for text in parts.values()):
        if abs(sum(map(float, parts.values())) - 1) > 1e-6:
            raise ValueError(
                f"{given} must give each of the experts 0-{num_experts - 1} to one {kind}: shares add up to 1."
            )
        ends = [round(num_experts * end) for end in accumulate(float(parts[name]) for name in shares)]
        groups = {name: list(range(*span)) for name, span in zip(shares, pairwise([0, *ends]), strict=True)}
    else:
        groups = {name: _numbers(parts[name], given) for name in shares}
    if sorted(number for numbers in groups.values() for number in numbers) != list(range(num_experts)):
        raise ValueError(f"{given} must give each of the experts 0-{num_experts - 1} to one {kind}.")
    return groups


def _numbers(text: str, given: str) -> list[int]:
    """Parses a list of numbers such as "0,2-5"."""
    try:
        ends = [span.partition("-") for span in text.split(",")]
        return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]
    except ValueError as error:
        raise ValueError(
            f"{given}: {text!r} is neither a list of experts, such as 0-3 or 0,2-5, nor a share."
        ) from error


def renumbered_groups(
    groups: Mapping[str, Sequence[int]], orders: Mapping[int, Sequence[int]], flag: str
) -> tuple[str, ...]:
    """Returns the flag's values after experts were moved to other places; empty if there are no layers.

    Args:
        groups: The numbers of each group's experts.
        orders: For each layer with these groups, which expert is at each place after the move.
        flag: The flag, for messages.

    Raises:
        ValueError: The new numbers differ between layers, which the flag cannot express.
    """
    found: dict[tuple[str, ...], int] = {}
    for layer, order in orders.items():
        places = {name: [place for place, one in enumerate(order) if one in own] for name, own in groups.items()}
        found.setdefault(tuple(f"{name}={_spans(numbers)}" for name, numbers in places.items()), layer)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise ValueError(
            f"{flag} holds for all layers, but would be {' '.join(one)} in layer {first} and {' '.join(other)} in "
            f"layer {second}; plan with loads in which every expert has tokens."
        )
    return next(iter(found), ())


def _spans(numbers: Sequence[int]) -> str:
    """Returns numbers in ascending order as text such as "0,2-5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))
