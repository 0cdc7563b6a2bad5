# SPDX-License-Identifier: Apache-2.0
"""The warning about collapsing routing, given only where there is enough data and this run's flags can fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_smar.modalities import Modalities
from megatron_smar.monitoring.config import LEAST_TOKENS
from megatron_smar.monitoring.load import chosen_share
from megatron_smar.routing.strategies.base import BALANCE_REMEDY

# The threshold is at least this multiple of even load, K / E, which is 0.875 with 7 of 8 experts per token.
TIMES_EVEN = 1.5


@dataclass
class CollapseWatch:
    """Warns once when almost all tokens of a modality are routed to one expert (the paper's Figure 4c).

    The same expert is reported again only after an interval in which it was below the threshold. Intervals with fewer
    than `least_tokens` or 16 E tokens of a modality are skipped: too few to judge.

    Attributes:
        threshold: Share of a modality's tokens above which there is a warning.
        top_k: K, experts per token.
        modalities: Names of the M modalities, by id.
        router_learns: Whether the run trains the router; no flag of the run can balance a frozen router.
        remedy: What the warning advises to do.
        least_tokens: Fewest tokens of a modality in an interval that is judged.
    """

    threshold: float
    top_k: int
    modalities: Sequence[str] = Modalities().names
    router_learns: bool = True
    remedy: str = BALANCE_REMEDY
    least_tokens: int = LEAST_TOKENS
    _known: set[tuple[int, int, int]] = field(default_factory=set)  # layer, modality, expert

    def check(self, sums: Tensor, most: int = 8) -> str | None:
        """Returns the warning for an interval, one sentence, or None.

        Args:
            sums: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
            most: Most experts that are named; of the others only the number is given.
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
        return (
            f"routing collapses: {', '.join(named)}{more} (experts count from 0; --moe-collapse-threshold "
            f"{self.threshold:g}): {self.remedy}."
        )
