# SPDX-License-Identifier: Apache-2.0
"""Phi's decoder layer, with attention and feed-forward layer in parallel, and the bias of Phi's output layer."""

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

    Both halves of Megatron's layer accept the output of a norm as a pair with the residual. Here both receive the
    output of the one shared norm; biases, dropout, recomputation and experts are Megatron's. The layer's spec must have
    no other norms.

    Args:
        config: Megatron's TransformerConfig.
        *args: Positional arguments of Megatron's layer.
        shared_layernorm: Builder of the shared norm.
        **kwargs: Keyword arguments of Megatron's layer.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, shared_layernorm: LayerNormBuilder, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.shared_layernorm = shared_layernorm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Maps hidden states [s, b, h] to [s, b, h] and the context; arguments are those of Megatron's layer."""
        normalized = self.shared_layernorm(hidden_states)
        attended, context = self._forward_attention((normalized, hidden_states), *args, **kwargs)
        output = self._forward_mlp(
            (normalized, attended),
            kwargs.get("inference_context"),
            padding_mask=kwargs.get("padding_mask"),
            packed_seq_params=kwargs.get("packed_seq_params"),
        )
        return output, context


def add_output_bias(layer: ColumnParallelLinear) -> None:
    """Adds a bias [vocabulary / tp], initialized to zero, to Megatron's output layer, whose forward pass adds it.

    Args:
        layer: GPTModel's output layer, which Megatron always builds without a bias.
    """
    layer.bias = nn.Parameter(torch.zeros(layer.output_size_per_partition, dtype=layer.config.params_dtype))
    set_tensor_model_parallel_attributes(layer.bias, True, 0, 1)
