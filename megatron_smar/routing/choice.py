# SPDX-License-Identifier: Apache-2.0
"""A bias per token and expert on Megatron's choice of experts, under any score function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TopK = Callable[..., tuple[Tensor, Tensor]]


class BiasedChoice:
    """Chooses experts by score + bias; Megatron still computes the routing weights from the unbiased scores.

    Megatron adds its own `expert_bias` only to sigmoid scores. But under every score function it lets the router's
    `router_replay`, if set, choose the experts.

    Args:
        bias: [N, E]; -inf for experts that a token may not choose.
        scores_are_logits: Whether Megatron chooses by logits (softmax after top-k). The bias is then added to their
            softmax, which has the same order, so that a bias means the same under both orders of softmax and top-k.
    """

    def __init__(self, bias: Tensor, scores_are_logits: bool) -> None:
        self._bias = bias
        self._scores_are_logits = scores_are_logits

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        """Returns the scores and the numbers of the chosen experts, [N, K] each; the interface is Megatron's.

        Args:
            scores: What Megatron chooses by, [N, E]: logits, or scores with or without its expert bias.
            topk: K, experts per token.
            num_groups: Number of groups of experts.
            group_topk: Groups per token.
            default_compute_topk: Megatron's own choice, by the given scores.
        """
        with torch.no_grad():
            compared = scores
            if self._scores_are_logits:
                compared = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
            _, chosen = default_compute_topk(compared + self._bias, topk, num_groups, group_topk)
        return scores.gather(1, chosen), chosen
