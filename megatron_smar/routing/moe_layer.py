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

    Args:
        *args: Megatron's positional arguments.
        skips_unused: Whether the model's last layer computes its experts only at positions whose loss counts: nothing
            else reads its output elsewhere. All tokens are routed, and are in the statistics.
        **kwargs: Megatron's keyword arguments.
    """

    router: ModalityAwareRouter
    moe_layer_recompute: bool

    def __init__(self, *args: Any, skips_unused: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_experts_their_own_optimizer(self.experts)
        self.skips_unused = skips_unused
        self._sizes = torch.Size()  # of the hidden states of the pass that is running
        self._dispatched: Tensor | None = None  # positions that get experts, as indices of [s, b], flattened; None: all

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
        mask, sample_ids, predicts, scores = split_columns(columns, router.modality_routing.num_modalities)
        router.sample_ids = sample_ids.transpose(0, 1)
        router.scores = None if scores is None else scores.transpose(0, 1)
        if self.skips_unused and self.layer_number == self.config.num_layers:
            self._dispatched = _positions(predicts)
        # Megatron begins to recompute inside its forward pass, where a second pass would not find the columns again.
        recomputes, self.moe_layer_recompute = self.moe_layer_recompute, False
        try:
            return super().forward(hidden_states, None, mask)
        finally:
            self.moe_layer_recompute = recomputes
            router.sample_ids = router.scores = self._dispatched = None

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Prepares the dispatch as Megatron does, of those positions only that get experts.

        Args:
            hidden_states: [s, b, h].
            probs: [s * b, E].
            routing_map: [s * b, E] bool.
        """
        self._sizes = hidden_states.shape
        if self._dispatched is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, self._dispatched).unsqueeze(1)
            probs, routing_map = (of.index_select(0, self._dispatched) for of in (probs, routing_map))
        prepared: tuple[Tensor, Tensor] = super().preprocess(hidden_states, probs, routing_map)
        return prepared

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Returns Megatron's output [s, b, h], zero without experts, with the auxiliary losses attached."""
        if self._dispatched is None:
            return self.router.finish(super().postprocess(output, shared_expert_output))
        output = super().postprocess(output, None).squeeze(1)
        output = output.new_zeros(self._sizes).flatten(0, 1).index_copy(0, self._dispatched, output).view(self._sizes)
        return self.router.finish(output if shared_expert_output is None else output + shared_expert_output)


def _positions(chosen: Tensor) -> Tensor:
    """Returns where `chosen`, [b, s] bool, is True, as indices of [s, b], flattened; the first position if nowhere.

    Kernels of the dispatch need not work without tokens, and the output of an expert that nothing reads is harmless.
    """
    found = chosen.t().flatten().nonzero().squeeze(1)
    return found if len(found) else found.new_zeros(1)
