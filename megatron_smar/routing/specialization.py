# SPDX-License-Identifier: Apache-2.0
"""How the experts' load differs between modalities: load, its entropy, and the Modality Specialization Index.

These are measures without gradients; none of them is part of a loss. All accept leading dimensions, so that all layers
of a model can be measured in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_load(counts: Tensor) -> Tensor:
    """Returns each expert's share of a modality's token slots, [..., M, E].

    Rows sum to 1, or are 0 for an absent modality. This is F = counts / (K tokens) of SMAR's Eq. 6 as long as no token
    is dropped; under capacity limits it is the share of the slots that were executed, so that loads stay comparable
    between modalities.

    Args:
        counts: Tokens of modality m that chose expert e, [..., M, E].
    """
    total = counts.sum(dim=-1, keepdim=True)
    return counts / torch.where(total > 0, total, 1.0)


def load_entropy(load: Tensor) -> Tensor:
    """Returns the entropy of each modality's load over the experts, [..., M], in nats.

    It is log E if the load is even, and 0 if one expert has all of it.

    Args:
        load: Load [..., M, E], as returned by `expert_load`.
    """
    return torch.special.entr(load).sum(dim=-1)


def dropped_share(counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Returns the share of each modality's K * tokens slots that capacity limits dropped, [..., M].

    It is 0 for an absent modality.

    Args:
        counts: Tokens per modality and expert after dropping, [..., M, E].
        tokens: Tokens per modality before dropping, [..., M].
        top_k: K, experts per token.
    """
    slots = top_k * tokens
    return (slots - counts.sum(dim=-1)) / torch.where(slots > 0, slots, 1.0)


def modality_specialization_index(load: Tensor) -> Tensor:
    """Returns the Modality Specialization Index (MSI) of each layer, [...], in [0, 1].

    SMoES describes what it measures, "how far the modality mix that experts receive departs from uniform; 0 none, 1
    every expert sees one modality", but the text available to this project gives no formula. This is this project's
    interpretation. An expert's mix is p(m|e) = F[m,e] / sum_m F[m,e]. It is computed from loads, so that all modalities
    have equal weight whatever their number of tokens. Its distance from uniform is the total variation divided by the
    largest value that the total variation can take,

        d_e = sum_m |p(m|e) - 1/M| / (2 (1 - 1/M)),

    and each expert is weighted by the load it receives: MSI = sum_e d_e sum_m F[m,e] / M. The weights cancel the
    denominators: MSI = sum_{m,e} |F[m,e] - mean_m F[m,e]| / (2 (M - 1)). For M = 2 that is the total variation distance
    between the loads of the two modalities.

    Absent modalities are left out, also of M; if fewer than two modalities are present, the index is 0.

    Args:
        load: Load [..., M, E], as returned by `expert_load`; the row of an absent modality is 0.
    """
    present = load.sum(dim=-1, keepdim=True) > 0
    number = present.sum(dim=-2, keepdim=True)
    mean = load.sum(dim=-2, keepdim=True) / number.clamp(min=1)
    departure = torch.where(present, (load - mean).abs(), 0.0).sum(dim=(-2, -1))
    return departure / (2 * (number.squeeze((-2, -1)) - 1).clamp(min=1))
