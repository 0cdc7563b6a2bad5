# SPDX-License-Identifier: Apache-2.0
"""Norms that Megatron lacks: for its local layer spec, and OLMoE's over all heads of a projection."""

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
    """torch's RMSNorm or LayerNorm, with its parameters marked for sequence parallelism.

    Megatron sums the gradients of marked parameters over the tensor-parallel ranks, each of which sees a shard of the
    sequence: that mark is all that the local norms lacked.

    Raises:
        ValueError: For a normalization that torch has no module of.
    """
    norms = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    if config.normalization not in norms or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"--normalization {config.normalization} (zero-centred: {config.layernorm_zero_centered_gamma}) is not in "
            "the local layers; use RMSNorm or LayerNorm, or --transformer-impl transformer_engine."
        )
    norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class ProjectionNorm(nn.Module):
    """RMSNorm over the queries (or keys) of all heads together, as OLMoE has it; Megatron's own is per head.

    Each tensor-parallel rank holds some heads, so the squares are summed over the ranks. The weight lies whole on each
    of them: Megatron adds up the gradients of everything named q_layernorm or k_layernorm over tensor-parallel ranks.

    Args:
        config: Megatron's.
        hidden_size: Size of a head.
        eps: Added to the mean square.
        heads: Number of heads, on all ranks together, each of which holds as many.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int) -> None:
        super().__init__()
        self.group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """This rank's heads [s, b, n, d], normalised over all ranks' n and d."""
        values = heads.to(torch.promote_types(heads.dtype, torch.float32))
        # Forward and backward are sums over the ranks: each one's output depends on the squares of all.
        squares = values.square().sum(dim=(-2, -1), keepdim=True)
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normalised = values * torch.rsqrt(squares / self.weight.numel() + self.eps)
        weight = self.weight.view(-1, heads.shape[-1]).chunk(self.group.size())[self.group.rank()]
        return weight * normalised.to(heads.dtype)
