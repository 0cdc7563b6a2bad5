# SPDX-License-Identifier: Apache-2.0
"""Bins of experts, and how much a token's bin says about its modality (SMoES, arXiv 2604.23996, section 3).

`bin_experts` forms the bins. Of each sample i there is the mean routing probability of modality m in bin B_k,

    S_{i,m,k} = sum_{e in B_k} sum_j M_{ij,m} g_{ij,e} / (N_B sum_j M_{ij,m})

with soft scores M, router probabilities g and N_B experts per bin, from which `joint_distribution` forms P_i(m, B_k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bin_experts(loads: Tensor, bins: int) -> Tensor:
    """Returns the bin of each expert, [E] int64: experts sorted by their share of text, in bins of equal size.

        f_spec(e) = C_{text,e} / sum_m C_{m,e}

    Experts of the same share keep their order. An expert without tokens has the share 1/2.

    Args:
        loads: C, the tokens of each modality that each expert received, [M, E]; row 0 is text.
        bins: Number of bins, a divisor of E.
    """
    total = loads.sum(dim=0)
    share = torch.where(total > 0, loads[0] / total.clamp(min=torch.finfo(loads.dtype).tiny), 0.5)
    order = torch.argsort(share, stable=True)
    places = torch.arange(loads.shape[1], device=loads.device)
    return torch.empty_like(places).scatter_(0, order, places // (loads.shape[1] // bins))


def joint_distribution(sums: Tensor, masses: Tensor) -> Tensor:
    """Returns P(m, B_k) of each sample, [S, M, B]; all 0 for a sample without tokens.

    Args:
        sums: sum_j M_{j,m} g_{j,B_k} over each sample's tokens, [S, M, B].
        masses: sum_j M_{j,m}, [S, M].
    """
    tiny = torch.finfo(sums.dtype).tiny
    means = sums / masses.unsqueeze(-1).clamp(min=tiny)
    return means / means.sum(dim=(1, 2), keepdim=True).clamp(min=tiny)


def mutual_information(joint: Tensor) -> Tensor:
    """Returns I(M; B) = sum_{m,k} P(m,k) log(P(m,k) / (P(m) P(k))) in nats, [S], of joint distributions [S, M, B].

    0 for a sample that has one modality only, or no tokens.
    """
    independent = joint.sum(dim=2, keepdim=True) * joint.sum(dim=1, keepdim=True)
    return (joint * (_log(joint) - _log(independent))).sum(dim=(1, 2))


def divergence_between_bins(joint: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns the symmetric KL divergence between the modalities' distributions over the bins, in nats, [S].

    The mean over the pairs of modalities that the sample has; 0 if it has fewer than two. The distributions are
    smoothed, (P + eps) / (1 + B eps), as in `mrd.modality_routing_distribution`.

    Args:
        joint: Joint distributions P(m, B_k), [S, M, B].
        eps: Smoothing term.
    """
    mass = joint.sum(dim=2, keepdim=True)
    present = (mass > 0).squeeze(2)
    bins = joint.shape[2]
    shares = (joint / mass.clamp(min=torch.finfo(joint.dtype).tiny) + eps) / (1 + bins * eps)
    difference = shares.unsqueeze(1) - shares.unsqueeze(2)  # [S, M, M, B]
    logarithms = shares.log().unsqueeze(1) - shares.log().unsqueeze(2)
    pairs = present.unsqueeze(1) & present.unsqueeze(2)
    pairs = pairs & ~torch.eye(joint.shape[1], dtype=torch.bool, device=joint.device)
    divergences = 0.5 * (difference * logarithms).sum(dim=-1) * pairs
    return divergences.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def _log(probabilities: Tensor) -> Tensor:
    """Returns logarithms, 0 where a probability is 0, with a gradient of 0 there."""
    return torch.where(probabilities > 0, probabilities, 1.0).log()
