# SPDX-License-Identifier: Apache-2.0
"""Megatron's MoE layer with a modality-aware router."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_smar.routing.router import ModalityAwareRouter


class ModalityAwareMoELayer(MoELayer):
    """`MoELayer` that finishes its router's statistics last.

    The router launches their reduction; dispatch, experts and combine run meanwhile; the wait comes here.

    Its experts have an optimizer of their own under every layout. Megatron 0.19.2 gives them one only where they are
    cut otherwise than the dense layers (EP, or ETP unlike TP), and cannot load an optimizer's state across that line.
    """

    router: ModalityAwareRouter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # reduced over the experts' replicas, which without EP are all replicas

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """As Megatron's, [s, b, h]; then the auxiliary losses are attached."""
        return self.router.finish(super().postprocess(output, shared_expert_output))
