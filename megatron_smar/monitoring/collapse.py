# SPDX-License-Identifier: Apache-2.0
"""The warning of collapsing routing: only where it can be seen, and where this run can do something about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_smar.modalities import Modalities
from megatron_smar.monitoring.config import LEAST_TOKENS
from megatron_smar.monitoring.load import chosen_share

# A share near even load, K / E: with 7 of 8 experts per token it is 0.875.
TIMES_EVEN = 1.5


@dataclass
class CollapseWatch:
    """Warns when nearly all tokens of a modality choose the same expert (the paper's Figure 4c), once.

    An expert that was named is not named again before an interval has shown it recovered. An interval with fewer
    than `least_tokens`, or than 16 E, of a modality shows nothing of it.

    Attributes:
        threshold: Share of a modality's tokens above which it speaks.
        top_k: K, experts per token.
        modalities: Names of the M modalities, by id.
        router_learns: Whether the run changes the router; a frozen one is as it was given, and no flag of this run
            can balance it.
        remedy: What the strategy's flags can do about it; "" for nothing.
        least_tokens: Of a modality in an interval.
    """

    threshold: float
    top_k: int
    modalities: Sequence[str] = Modalities().names
    router_learns: bool = True
    remedy: str = ""
    least_tokens: int = LEAST_TOKENS
    _known: set[tuple[int, int, int]] = field(default_factory=set)  # layer, modality, expert

    def check(self, sums: Tensor, most: int = 8) -> str | None:
        """The warning that an interval calls for, one sentence, or None.

        Args:
            sums: [L, M, E + 1], the counts per expert, then the tokens, of each layer and modality.
            most: Experts that are named; of further ones the number is given.
        """
        shares = chosen_share(sums)
        experts = shares.shape[-1]
        limit = max(self.threshold, TIMES_EVEN * self.top_k / experts)
        if not self.router_learns or limit >= 1:
            return None
        enough = sums[..., -1:] >= max(self.least_tokens, 16 * experts)
        collapsed = {tuple(place) for place in ((shares > limit) & enough).nonzero().tolist()}
        unknown = sorted(collapsed - self._known)
        self._known = collapsed | {place for place in self._known if not enough[place[:2]]}
        if not unknown:
            return None
        named = [
            f"{100 * float(shares[layer, modality, expert]):.1f}% of the {self.modalities[modality]} tokens choose "
            f"expert {expert} of layer {layer + 1}"
            for layer, modality, expert in unknown[:most]
        ]
        more = f", and {len(unknown) - most} more" if len(unknown) > most else ""
        advice = "balance with --moe-aux-loss-coeff."
        if self.remedy:
            advice = f"{self.remedy}, or {advice}"
        return (
            f"routing collapses: {', '.join(named)}{more} (experts count from 0; --moe-collapse-threshold "
            f"{self.threshold:g}): {advice}"
        )
