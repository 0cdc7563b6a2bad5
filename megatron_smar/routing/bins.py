# SPDX-License-Identifier: Apache-2.0
"""Bins of experts, and how much a token's bin says about its modality (SMoES, arXiv 2604.23996, section 3).

`expert_bins` forms the bins. Of each sample i there is the mean routing probability of modality m in bin B_k,

    S_{i,m,k} = sum_{e in B_k} sum_j M_{ij,m} g_{ij,e} / (N_B sum_j M_{ij,m})

with soft scores M, router probabilities g and N_B experts per bin, from which `joint_distribution` forms P_i(m, B_k).
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_bins(loads: Tensor, num_bins: int) -> Tensor:
    """Returns the bin of each expert, [E] int64: experts sorted by their share of text, in bins of equal size.

        f_spec(e) = C_{text,e} / sum_m C_{m,e}

    Experts of the same share keep their order. An expert without tokens has the share 1/2.

    Args:
        loads: C, the tokens of each modality that each expert received, [M, E]; row 0 is text.
        num_bins: Number of bins, a divisor of E.

    Raises:
        ValueError: The experts cannot be shared equally by the bins.
    """
    experts = loads.shape[1]
    if num_bins < 1 or experts % num_bins:
        raise ValueError(f"{num_bins} bins do not divide {experts} experts.")
    total = loads.sum(dim=0)
    share = torch.where(total > 0, loads[0] / total.where(total > 0, 1), 0.5)
    order = torch.argsort(share, stable=True)
    places = torch.arange(experts, device=loads.device)
    return torch.empty_like(places).scatter_(0, order, places // (experts // num_bins))


def bin_members(bins: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    """Returns which expert is in which bin, [E, B], one-hot."""
    return (bins.unsqueeze(1) == torch.arange(num_bins, device=bins.device)).to(dtype)


def bin_masses(scores: Tensor, gates: Tensor, bins: Tensor, num_bins: int) -> Tensor:
    """Returns M_{j,m} sum_{e in B_k} g_{j,e} / N_B of each token, [N, M, B].

    Args:
        scores: M, modality scores, [N, M]; all 0 for padding.
        gates: g, router probabilities, [N, E].
        bins: The bin of each expert, [E].
        num_bins: B.
    """
    members = bin_members(bins, num_bins, gates.dtype)
    return scores.unsqueeze(2) * (gates @ members / members.sum(dim=0).clamp(min=1)).unsqueeze(1)


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


def inter_bin_mutual_information(scores: Tensor, gates: Tensor, bins: Tensor, sample_ids: Tensor) -> Tensor:
    """Returns I_i(M; B) of each sample in nats, [S], of tokens that are all on this rank.

    Args:
        scores: M, modality scores, [N, M].
        gates: g, router probabilities, [N, E].
        bins: The bin of each expert, [E], from 0.
        sample_ids: The sample of each token, [N], 0 to S - 1; -1 for padding, which does not count.
    """
    gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
    scores = scores.to(gates.dtype)
    number = int(sample_ids.max()) + 1
    of_sample = (torch.arange(number, device=sample_ids.device).unsqueeze(1) == sample_ids).to(gates.dtype)
    masses = bin_masses(scores, gates, bins, int(bins.max()) + 1)
    sums = (of_sample @ masses.flatten(1)).unflatten(1, masses.shape[1:])
    return mutual_information(joint_distribution(sums, of_sample @ scores))


def intra_bin_balance(counts: Tensor, probs: Tensor, tokens: Tensor | float, top_k: int, bins: Tensor) -> Tensor:
    """Returns the balance loss of one layer, a scalar; 1 / B for an even load.

        L_bal = sum_k N_B sum_{e in B_k} f_e P_e,   f_e = counts_e / (K N),   P_e = probs_e / N

    f and P are shares of all tokens, as in the paper's formula, so with bins of equal size the loss also balances
    between bins.

    Args:
        counts: Tokens that each expert received, [E].
        probs: Sum of the router probabilities over the tokens, [E].
        tokens: N, number of tokens without padding.
        top_k: K, experts per token.
        bins: The bin of each expert, [E].
    """
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    sizes = (bins.unsqueeze(1) == bins).sum(dim=1)  # N_B of each expert's bin
    return (sizes * counts / (top_k * tokens) * probs / tokens).sum()


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
