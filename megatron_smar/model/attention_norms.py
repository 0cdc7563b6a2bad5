# SPDX-License-Identifier: Apache-2.0
"""Norms inside of attention that Megatron does not have: OLMoE's and DeepSeek's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


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


class LatentAttention(MLASelfAttention):
    """Multi-latent attention with the norms of its spec and no others, and whole gradients under the local spec.

    Where queries have no latent (DeepSeek-V2-Lite, Moonlight), Megatron 0.19.2 builds them with a norm on the hidden
    state under Transformer Engine, and not at all under the local spec. There it also gives the rotary part of the keys
    a gradient from this tensor-parallel rank's heads alone.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The spec's parts, as they are."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of queries and of keys and values [s / tp, b, ...], whole, as Transformer Engine's layers do.

        From there Megatron gathers the rotary part with its gradients summed over the ranks.
        """
        queries, latents = super()._qkv_down_projection(hidden_states)
        if latents.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            latents = gather_from_tensor_model_parallel_region(latents, group=self.tp_group)
            latents = scatter_to_sequence_parallel_region(latents, group=self.tp_group)
        return queries, latents
