# SPDX-License-Identifier: Apache-2.0
"""Megatron's MoE layer with a modality-aware router."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_smar.routing.router import ModalityAwareRouter


class ModalityAwareMoELayer(MoELayer):
    """`MoELayer` that finishes its router's statistics last.

    The router launches their reduction; dispatch, experts and combine run meanwhile; the wait comes here.
    """

    router: ModalityAwareRouter

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """As Megatron's, [s, b, h]; then the auxiliary loss is hung on the output."""
        return self.router.finish(super().postprocess(output, shared_expert_output))
