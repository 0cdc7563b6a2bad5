# SPDX-License-Identifier: Apache-2.0
"""Soft Modality-Aware Routing.

`modalities` -> `statistics` -> `mrd` -> `losses` is the paper's mathematics, equation by equation, and needs torch
alone, as do the measures in `specialization`; `router` and `moe_layer` put it into Megatron.
"""

from megatron_smar.routing.losses import layer_distance_and_loss, smar_loss
from megatron_smar.routing.modalities import (
    PADDING,
    TEXT,
    VISION,
    modality_ids_from_tokens,
    modality_mask_from_ids,
)
from megatron_smar.routing.mrd import modality_routing_distribution, mrd_distance
from megatron_smar.routing.specialization import (
    dropped_share,
    expert_load,
    load_entropy,
    modality_specialization_index,
)
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics, routing_statistics

__all__ = [
    "PADDING",
    "TEXT",
    "VISION",
    "PendingStatistics",
    "RoutingStatistics",
    "dropped_share",
    "expert_load",
    "layer_distance_and_loss",
    "load_entropy",
    "modality_ids_from_tokens",
    "modality_mask_from_ids",
    "modality_routing_distribution",
    "modality_specialization_index",
    "mrd_distance",
    "routing_statistics",
    "smar_loss",
]
