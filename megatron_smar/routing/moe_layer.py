# SPDX-License-Identifier: Apache-2.0
"""Megatron's MoE layer with a modality-aware router."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_smar.routing.router import ModalityAwareRouter
from megatron_smar.routing.token_columns import split_columns


def give_experts_their_own_optimizer(experts: nn.Module) -> None:
    """Marks expert parameters as expert-parallel even at EP 1, so that Megatron always optimizes them separately.

    Megatron 0.19.2 by default uses a separate optimizer only where the experts are sharded differently from the dense
    layers (EP > 1, or ETP different from TP). It cannot load an optimizer's state from a checkpoint with a separate
    optimizer into a run without one, or the reverse: a run saved at EP 1 could not be resumed at EP 2.

    Args:
        experts: The experts of a MoE layer.
    """
    for parameter in experts.parameters():
        # Reduced over the experts' replicas, which without EP are all replicas.
        parameter.allreduce = False  # type: ignore[attr-defined]


class ModalityAwareMoELayer(MoELayer):
    """`MoELayer` that waits for its router's statistics at the end.

    The router launches their all-reduce, which overlaps with dispatch, experts and combine; `postprocess` waits for it.
    """

    router: ModalityAwareRouter
    moe_layer_recompute: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_experts_their_own_optimizer(self.experts)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the layer as Megatron does.

        Args:
            hidden_states: [s, b, h].
            intermediate_tensors: Megatron's, for CUDA graphs.
            padding_mask: The modality mask, [b, s, M] bool, or the columns of `routing.token_columns`.
        """
        if padding_mask is None or padding_mask.dtype == torch.bool:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._forward_columns, False, hidden_states, padding_mask)
        return self._forward_columns(hidden_states, padding_mask)

    def _forward_columns(self, hidden_states: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        router = self.router
        mask, sample_ids, scores = split_columns(columns, router.modality_routing.num_modalities)
        router.sample_ids = sample_ids.transpose(0, 1)
        router.scores = None if scores is None else scores.transpose(0, 1)
        # Megatron begins to recompute inside its forward pass, where a second pass would not find the columns again.
        recomputes, self.moe_layer_recompute = self.moe_layer_recompute, False
        try:
            return super().forward(hidden_states, None, mask)
        finally:
            self.moe_layer_recompute = recomputes
            router.sample_ids = router.scores = None

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Returns Megatron's output [s, b, h] with the auxiliary losses attached."""
        return self.router.finish(super().postprocess(output, shared_expert_output))
