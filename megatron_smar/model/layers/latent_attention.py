# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's multi-latent attention, with exactly the norms of its spec."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Multi-latent attention with exactly the norms of its spec, and complete gradients under the local spec.

    Where queries have no latent (DeepSeek-V2-Lite, Moonlight), Megatron 0.19.2 adds a norm on the hidden state to them
    under Transformer Engine, and cannot build them under the local spec. Under the local spec it also computes the
    gradient of the keys' rotary part from this tensor-parallel rank's heads only.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Returns the spec's submodules unchanged."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the latents of queries and of keys and values, [s / tp, b, ...], as Transformer Engine's layers do.

        Their last dimension is complete, not sharded over the tensor-parallel ranks. For this form Megatron gathers the
        rotary part such that its gradients are summed over the ranks.
        """
        queries, latents = super()._qkv_down_projection(hidden_states)
        if latents.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            latents = gather_from_tensor_model_parallel_region(latents, group=self.tp_group)
            if self.config.sequence_parallel:  # decoding turns it off
                latents = scatter_to_sequence_parallel_region(latents, group=self.tp_group)
        return queries, latents
