# SPDX-License-Identifier: Apache-2.0
"""Hard routing: separate experts for each modality (Mono-InternVL, arXiv 2410.08202; MoMa, arXiv 2407.21770)."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from megatron_smar.routing.strategies.base import StrategyConfig


@dataclass(frozen=True)
class HardConfig(StrategyConfig):
    """Settings of hard routing.

    Attributes:
        experts: The experts of each modality; each expert belongs to exactly one modality. Given as numbers from 0,
            such as text=0-3 vision=4-7 or text=0,2-5 vision=1,6,7, or as shares in order, such as text=0.75
            vision=0.25. Default: equal shares.
    """

    name = "hard"
    title = "each modality has its own experts (Mono-InternVL, MoMa)"
    of_a_run: ClassVar[tuple[str, ...]] = ("experts",)
    of_inference: ClassVar[tuple[str, ...]] = ("experts",)

    experts: tuple[str, ...] = ()

    @classmethod
    def check_unused(cls, args: Namespace) -> None:
        """Refuses --hard-experts where another strategy is chosen."""
        given = getattr(args, f"{cls.name}_experts")
        if given:
            raise ValueError(
                f"{cls.flag('experts')} {' '.join(given)} has no effect with --modality-routing "
                f"{args.modality_routing}; leave it out, or give --modality-routing {cls.name}."
            )

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return f"{self.name}: experts {' '.join(self.experts) or 'in equal shares'}"

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """Returns the experts of each modality, [M, E] bool, the same in all layers."""
        equal = dict.fromkeys(modalities, str(1 / len(modalities)))
        parts = dict(part.partition("=")[::2] for part in self.experts) or equal
        given = f"{self.flag('experts')} {' '.join(self.experts)}"
        if (self.experts and len(parts) < len(self.experts)) or sorted(parts) != sorted(modalities):
            raise ValueError(f"{given} must name each of {', '.join(modalities)} once, as text=0-3 vision=4-7.")
        if all(re.fullmatch(r"\d*\.\d+", text) for text in parts.values()):
            if abs(sum(map(float, parts.values())) - 1) > 1e-6:
                raise ValueError(
                    f"{given} must give each of the experts 0-{num_experts - 1} to one modality: shares add up to 1."
                )
            ends = [round(num_experts * end) for end in accumulate(float(parts[name]) for name in modalities)]
            own = [list(range(*span)) for span in pairwise([0, *ends])]
        else:
            own = [_numbers(parts[name], given) for name in modalities]
        if sorted(number for numbers in own for number in numbers) != list(range(num_experts)):
            raise ValueError(f"{given} must give each of the experts 0-{num_experts - 1} to one modality.")
        table = torch.zeros(len(modalities), num_experts, dtype=torch.bool, device="cpu")
        for modality, numbers in enumerate(own):
            table[modality, numbers] = True
        return table


def _numbers(text: str, given: str) -> list[int]:
    """Parses a list of numbers such as "0,2-5"."""
    try:
        ends = [span.partition("-") for span in text.split(",")]
        return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]
    except ValueError as error:
        raise ValueError(
            f"{given}: {text!r} is neither a list of experts, such as 0-3 or 0,2-5, nor a share."
        ) from error
