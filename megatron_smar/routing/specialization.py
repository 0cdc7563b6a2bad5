# SPDX-License-Identifier: Apache-2.0
"""How the experts' load differs between modalities: load, its entropy, and the Modality Specialization Index.

Measures alone, without gradient: nothing here enters a loss. All take leading dimensions, so that the layers of a model
can be measured at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_load(counts: Tensor) -> Tensor:
    """Each expert's share of a modality's token slots, [..., M, E]; rows sum to 1, or are 0 for an absent modality.

    This is F = counts / (K tokens) of SMAR's Eq. 6 as long as no token is dropped; under capacity limits the share is
    of the slots that were executed, so that loads stay comparable between modalities.

    Args:
        counts: [..., M, E], tokens of modality m that chose expert e.
    """
    total = counts.sum(dim=-1, keepdim=True)
    return counts / torch.where(total > 0, total, 1.0)


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of each modality's load over the experts, [..., M], in nats: log E if even, 0 if one expert has it all.

    Args:
        load: [..., M, E], of `expert_load`.
    """
    return torch.special.entr(load).sum(dim=-1)


def dropped_share(counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """Share of each modality's K tokens slots that capacity limits left unexecuted, [..., M]; 0 for an absent modality.

    Args:
        counts: [..., M, E], after dropping.
        tokens: [..., M], before dropping.
        top_k: K, experts per token.
    """
    slots = top_k * tokens
    return (slots - counts.sum(dim=-1)) / torch.where(slots > 0, slots, 1.0)


def modality_specialization_index(load: Tensor) -> Tensor:
    """Modality Specialization Index (MSI) of each layer, [...], in [0, 1].

    SMoES says what it measures, "how far the modality mix that experts receive departs from uniform; 0 none, 1 every
    expert sees one modality", and the text that we have gives no formula. This is our reading of it. An expert's mix is
    p(m|e) = F[m,e] / sum_m F[m,e]: from loads, so that the modalities weigh equally however many tokens each has. Its
    distance from uniform is the total variation over the largest value that it can take,

        d_e = sum_m |p(m|e) - 1/M| / (2 (1 - 1/M)),

    and the experts weigh as much as they receive: MSI = sum_e d_e sum_m F[m,e] / M. The weights cancel the
    denominators: MSI = sum_{m,e} |F[m,e] - mean_m F[m,e]| / (2 (M - 1)). For M = 2 that is the total variation distance
    between the loads of the two modalities.

    Only modalities that are present count, in M too; with fewer than two of them the index is 0.

    Args:
        load: [..., M, E], of `expert_load`; the row of an absent modality is 0.
    """
    present = load.sum(dim=-1, keepdim=True) > 0
    number = present.sum(dim=-2, keepdim=True)
    mean = load.sum(dim=-2, keepdim=True) / number.clamp(min=1)
    departure = torch.where(present, (load - mean).abs(), 0.0).sum(dim=(-2, -1))
    return departure / (2 * (number.squeeze((-2, -1)) - 1).clamp(min=1))
