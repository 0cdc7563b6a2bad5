# SPDX-License-Identifier: Apache-2.0
"""Soft Modality-Guided Expert Specialization (SMoES, arXiv 2604.23996): bins of experts, each for a mix of modalities.

Losses of a layer, with f_e = counts_e / (K N), P_e the mean router probability of expert e, N tokens, N_B experts per
bin, and the mutual information I_i(M; B) between modality and bin in sample i (`routing.bins`):

    L_MI  = -1/N_samples sum_i I_i(M; B)
    L_bal = sum_k N_B sum_{e in B_k} f_e P_e

Both are over all samples and tokens of one micro-batch on all ranks. A sample is a row, or a sequence of a pack.
Samples of one modality have I = 0 and are counted. Each token is weighted by its modality scores, which are hard labels
or soft (`routing.soft_scores`).

After each step the loads C become decay C + (1 - decay) counts. Every `rebin_interval` steps the bins are formed from
C, unless they are fixed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_smar.routing.bins import (
    bin_masses,
    bin_members,
    divergence_between_bins,
    expert_bins,
    intra_bin_balance,
    joint_distribution,
    mutual_information,
)
from megatron_smar.routing.samples import share_of_ranks
from megatron_smar.routing.soft_scores import gaussian_modality_scores, updated_gaussians
from megatron_smar.routing.strategies.base import (
    BALANCE_REMEDY,
    AuxiliaryLoss,
    LayerRouting,
    Metric,
    RoutedLayer,
    RoutedTokens,
    RoutingStrategy,
    StrategyConfig,
    Weighted,
)

INFORMATION_LOSS, BALANCE_LOSS = "smoes information loss", "smoes balance loss"
OBJECTIVE, CROSSING = "smoes objective", "bin crossing"


@dataclass(frozen=True)
class SmoesConfig(StrategyConfig):
    """Settings of SMoES. The defaults are the paper's.

    Attributes:
        scores: Soft modality scores. attention: accumulated along the layers' attention; gaussian: from a Gaussian per
            modality of the router's input; hard: the modality itself.
        bins: Number of bins of experts, at least 2. Default: the expert-parallel size; a resumed run keeps its number.
        fixed_bins: Whether the bins stay as in a new model, consecutive experts; otherwise they follow the load.
        rebin_interval: Steps after which the bins are formed again.
        objective: What is maximized between modality and bin. information: the mutual information; kl: the symmetric KL
            divergence between the modalities' distributions over the bins; none: nothing, there is only the balance.
        information_coeff: Weight of the loss that maximizes `objective`.
        balance_coeff: Weight of the balance loss.
        decay: Share of the old value that moving averages keep in each step, for loads and Gaussians.
    """

    name = "smoes"
    title = "soft modality scores and bins of experts (SMoES)"
    metrics = (
        *(Metric(INFORMATION_LOSS), Metric(BALANCE_LOSS)),
        *(Metric(OBJECTIVE, weighted=True), Metric(CROSSING, weighted=True)),
    )
    needs_samples = True
    keeps_state = True
    training_state = ("loads", "bins", "steps", "mean", "variance", "known")
    expert_axes: ClassVar[Mapping[str, int | None]] = {
        **{"loads": 1, "bins": 0},
        **dict.fromkeys(("steps", "mean", "variance", "known")),
    }
    of_a_run: ClassVar[tuple[str, ...]] = (
        *("scores", "bins", "fixed_bins", "rebin_interval", "objective"),
        *("information_coeff", "balance_coeff", "decay"),
    )
    collapse_remedy = f"raise --smoes-balance-coeff, lower --smoes-information-coeff, or {BALANCE_REMEDY}"

    scores: Literal["attention", "gaussian", "hard"] = "attention"
    bins: int | None = None
    fixed_bins: bool = False
    rebin_interval: int = 1
    objective: Literal["information", "kl", "none"] = "information"
    information_coeff: float = 1e-4
    balance_coeff: float = 1e-3
    decay: float = 0.99

    def __post_init__(self) -> None:
        if self.bins is not None and self.bins < 2:
            raise ValueError(
                f"--smoes-bins is {self.bins} (default: the expert-parallel size), and with fewer than 2 bins the loss "
                "is always 0; give a number from 2 that divides the number of experts."
            )
        if self.rebin_interval < 1:
            raise ValueError(f"--smoes-rebin-interval is {self.rebin_interval}; it must be 1 or more.")
        for name in ("information_coeff", "balance_coeff"):
            if getattr(self, name) < 0:
                raise ValueError(f"{self.flag(name)} is {getattr(self, name)}; it must be 0 or more.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"--smoes-decay is {self.decay}; it must be at least 0 and less than 1 (the paper: 0.99).")

    @property
    def needs_attention_scores(self) -> bool:
        """Whether soft modality scores are accumulated along the layers' attention."""
        return self.scores == "attention"

    @classmethod
    def default_flags(cls, args: Namespace, saved: Namespace | None) -> dict[str, int]:
        """Returns --smoes-bins where it is not given: the resumed run's, or else the size of expert parallelism."""
        if args.smoes_bins is not None:
            return {}
        stored = getattr(saved, "smoes_bins", None)
        return {cls.flag("bins"): args.expert_model_parallel_size if stored is None else stored}

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks the number of bins, and that scores by attention can be computed."""
        if self.bins is None:
            raise ValueError("--smoes-bins is missing; give a number from 2 that divides the number of experts.")
        if args.num_experts and args.num_experts % self.bins:
            raise ValueError(
                f"--smoes-bins {self.bins} does not divide --num-experts {args.num_experts} into bins of equal size; "
                "give a divisor."
            )
        if (args.fp8 or args.fp4) and "moe" in (args.recompute_modules or []):
            raise ValueError(
                "--recompute-modules moe with FP8 or FP4 recomputes the MoE layer without its sample ids and scores; "
                "leave moe out."
            )
        if not self.needs_attention_scores:
            return
        remedy = "give --smoes-scores gaussian or hard"
        if args.mtp_num_layers:
            raise ValueError(
                f"--smoes-scores attention has no scores for multi-token prediction layers (--mtp-num-layers "
                f"{args.mtp_num_layers}); {remedy}, or leave --mtp-num-layers out."
            )
        if getattr(args, "experimental_attention_variant", None):
            raise ValueError(
                f"--smoes-scores attention needs softmax attention, which --experimental-attention-variant "
                f"{args.experimental_attention_variant} does not compute; {remedy}."
            )

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        bins = f"{self.bins} {'fixed ' if self.fixed_bins else ''}bins"
        return f"SMoES: {self.scores} scores, {bins}, {self.objective}"

    def build(self, layer: RoutedLayer) -> Smoes:
        """Builds the strategy's module for one layer."""
        return Smoes(self, layer)


class Smoes(RoutingStrategy):
    """SMoES in one layer. Its buffers are its state and are the same on all ranks; `counts` is not saved."""

    config: SmoesConfig
    loads: Tensor
    counts: Tensor
    bins: Tensor
    steps: Tensor
    mean: Tensor
    variance: Tensor
    known: Tensor

    def __init__(self, config: SmoesConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        if config.bins is None or layer.num_experts % config.bins:
            raise ValueError(f"{config.bins} bins do not divide {layer.num_experts} experts.")
        self.num_bins = config.bins
        modalities, experts = layer.num_modalities, layer.num_experts
        self.register_buffer("loads", torch.zeros(modalities, experts))
        self.register_buffer("counts", torch.zeros(modalities, experts), persistent=False)
        self.register_buffer("bins", expert_bins(torch.zeros(modalities, experts), self.num_bins))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if config.scores == "gaussian":
            self.register_buffer("mean", torch.zeros(modalities, layer.hidden_size))
            self.register_buffer("variance", torch.ones(modalities, layer.hidden_size))
            self.register_buffer("known", torch.zeros(modalities, dtype=torch.bool))

    def scores(self, tokens: RoutedTokens, dtype: torch.dtype) -> Tensor:
        """Returns the modality scores of the tokens, [N, M]; 0 for padding."""
        if self.config.scores == "attention":
            if tokens.scores is None:
                raise RuntimeError("--smoes-scores attention got no scores: the model needs layers of `score_layer`.")
            return tokens.scores.to(dtype)
        hard = tokens.modality_mask.to(dtype)
        if self.config.scores == "hard":
            return hard
        soft = gaussian_modality_scores(tokens.hidden, self.mean, self.variance).to(dtype)
        return torch.where(self.known.all(), soft * hard.sum(dim=1, keepdim=True), hard)

    def sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns the objective's sum over samples, the number of samples, and what the balance loss needs."""
        if tokens.sample_sums is None:
            raise RuntimeError("SMoES sums over samples: pass `sample_ids` to the model.")
        gates = torch.softmax(tokens.logits.to(torch.promote_types(tokens.logits.dtype, torch.float32)), dim=-1)
        scores = self.scores(tokens, gates.dtype)
        weighted = bin_masses(scores, gates, self.bins, self.num_bins)
        of_samples = tokens.sample_sums(torch.cat([weighted.flatten(1), scores, tokens.modality_mask], dim=1))
        sums, masses, numbers = of_samples.split([weighted[0].numel(), *2 * scores.shape[1:]], dim=1)
        # Gaussian scores give some of each token to a modality that the sample does not have.
        of_modality = sums.unflatten(1, weighted.shape[1:]) * (numbers > 0).unsqueeze(2)
        joint = joint_distribution(of_modality, masses)
        measure = divergence_between_bins if self.config.objective == "kl" else mutual_information
        ranks = tokens.sample_sums.ranks
        is_token = tokens.modality_mask.any(dim=1, keepdim=True)
        members = bin_members(self.bins, self.num_bins, gates.dtype)
        bins_of_token = (tokens.routing_map.to(gates.dtype) @ members > 0).sum(dim=1, keepdim=True)
        return {
            "objective": share_of_ranks(measure(joint).sum(), ranks),
            "samples": share_of_ranks((numbers.sum(dim=1) > 0).sum().to(gates.dtype), ranks),
            "probabilities": (gates * is_token).sum(dim=0),
            "crossing": ((bins_of_token > 1) & is_token).sum().to(gates.dtype),
        }

    def losses(self, routing: LayerRouting) -> dict[str, AuxiliaryLoss]:
        """Returns the two losses of the layer."""
        config, sums = self.config, routing.sums
        tokens = routing.statistics.tokens.sum().clamp(min=1)
        counts = routing.statistics.counts.sum(dim=0)
        balance = intra_bin_balance(counts, sums["probabilities"], tokens, self.layer.top_k, self.bins)
        coefficient = 0.0 if config.objective == "none" else config.information_coeff
        return {
            INFORMATION_LOSS: AuxiliaryLoss(-sums["objective"] / sums["samples"].clamp(min=1), coefficient),
            BALANCE_LOSS: AuxiliaryLoss(balance, config.balance_coeff),
        }

    def measures(self, routing: LayerRouting) -> dict[str, Weighted]:
        """Returns the objective, which Megatron does not print as a loss below 0, and the share of crossing tokens.

        A token crosses if its experts lie in more than one bin.
        """
        tokens, samples = routing.statistics.tokens.sum(), routing.sums["samples"]
        return {
            OBJECTIVE: Weighted(routing.sums["objective"].detach() / samples.clamp(min=1), samples),
            CROSSING: Weighted(routing.sums["crossing"] / tokens.clamp(min=1), tokens),
        }

    def accumulate(self, routing: LayerRouting) -> None:
        """Counts the step's tokens per modality and expert."""
        self.counts += routing.statistics.counts

    def step_sums(self, tokens: RoutedTokens) -> dict[str, Tensor]:
        """Returns, by modality, the sums of x and x^2 and the number of tokens, for the Gaussians."""
        if self.config.scores != "gaussian":
            return {}
        one_hot, hidden = tokens.modality_mask.to(self.mean.dtype).t(), tokens.hidden.to(self.mean.dtype)
        return {"x": one_hot @ hidden, "squares": one_hot @ hidden.square(), "tokens": one_hot.sum(dim=1)}

    def update(self, sums: Mapping[str, Tensor]) -> None:
        """Updates loads, bins and Gaussians after a step."""
        self.loads.mul_(self.config.decay).add_(self.counts, alpha=1 - self.config.decay)
        self.counts.zero_()
        self.steps += 1
        if not self.config.fixed_bins:
            due = self.steps % self.config.rebin_interval == 0
            self.bins.copy_(torch.where(due, expert_bins(self.loads, self.num_bins), self.bins))
        if sums:
            state = self.mean, self.variance, self.known
            new = updated_gaussians(*state, sums["x"], sums["squares"], sums["tokens"], self.config.decay)
            for old, value in zip(state, new, strict=True):
                old.copy_(value)
