# SPDX-License-Identifier: Apache-2.0
"""Norms that Megatron lacks: those for its local layer spec, and OLMoE's norm over all heads of a projection."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> nn.Module:
    """Builds torch's RMSNorm or LayerNorm, with its parameters marked for sequence parallelism.

    Megatron sums the gradients of marked parameters over the tensor-parallel ranks, each of which sees a shard of the
    sequence. Megatron's own local norms lack only this mark.

    Raises:
        ValueError: torch has no module for this normalization.
    """
    norms = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    if config.normalization not in norms or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"--normalization {config.normalization} (zero-centered: {config.layernorm_zero_centered_gamma}) is not in "
            "the local layers; use RMSNorm or LayerNorm, or --transformer-impl transformer_engine."
        )
    norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class ProjectionNorm(nn.Module):
    """RMSNorm over the queries (or keys) of all heads together, as in OLMoE; Megatron's own norm is per head.

    Each tensor-parallel rank holds some of the heads, so the squares are summed over the ranks. The weight is
    replicated on all of them: Megatron sums the gradients of parameters named q_layernorm or k_layernorm over the
    tensor-parallel ranks.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: Size of a head.
        eps: Epsilon added to the mean square.
        heads: Number of heads of all ranks together; each rank holds the same number.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        super().__init__()
        self.group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalizes this rank's heads [s, b, n, d] over n and d of all ranks."""
        values = heads.to(torch.promote_types(heads.dtype, torch.float32))
        # Forward and backward both sum over the ranks: the output of each rank depends on the squares of all.
        squares = values.square().sum(dim=(-2, -1), keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normalized = values * torch.rsqrt(squares / self.weight.numel() + self.eps)
        weight = self.weight.view(-1, heads.shape[-1]).chunk(self.group.size())[self.group.rank()]
        return weight * normalized.to(heads.dtype)
