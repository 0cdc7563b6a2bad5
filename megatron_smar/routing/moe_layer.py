# SPDX-License-Identifier: Apache-2.0
"""Megatron's MoE layer with a modality-aware router."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from megatron_smar.routing.router import ModalityAwareRouter


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        give_experts_their_own_optimizer(self.experts)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Returns Megatron's output [s, b, h] with the auxiliary losses attached."""
        return self.router.finish(super().postprocess(output, shared_expert_output))
