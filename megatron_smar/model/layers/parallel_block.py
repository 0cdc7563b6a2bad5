# SPDX-License-Identifier: Apache-2.0
"""Phi's decoder layer, attention and feed-forward layer side by side, and its output layer's bias."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class ParallelBlockLayer(TransformerLayer):
    """x + attention(norm(x)) + feed-forward(norm(x)), with one norm for both (Phi, GPT-J).

    Megatron's layer takes the output of a norm as a pair with the residual, which is how both of its halves get the
    one norm's output here; biases, dropout, recomputation and experts stay its own. Its spec has no other norms.

    Args:
        config: Megatron's.
        *args: Of Megatron's layer.
        shared_layernorm: Builds the norm.
        **kwargs: Of Megatron's layer.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, shared_layernorm: LayerNormBuilder, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.shared_layernorm = shared_layernorm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's layer: [s, b, h] and what else it takes, to [s, b, h] and the context."""
        normalised = self.shared_layernorm(hidden_states)
        attended, context = self._forward_attention((normalised, hidden_states), *args, **kwargs)
        output = self._forward_mlp(
            (normalised, attended),
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        return output, context


def add_output_bias(layer: ColumnParallelLinear) -> None:
    """Gives Megatron's output layer a bias [vocabulary / tp], zero at the start; its forward pass adds what is there.

    Args:
        layer: GPTModel's, which is always built without.
    """
    layer.bias = nn.Parameter(torch.zeros(layer.output_size_per_partition, dtype=layer.config.params_dtype))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
