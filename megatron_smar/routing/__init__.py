# SPDX-License-Identifier: Apache-2.0
"""Modality-aware routing.

`modalities`, `statistics` and `mrd` are SMAR's mathematics, equation by equation. They need only torch, as do the
measures in `specialization`. `strategies` has one file per published routing; `router` and `moe_layer` integrate the
strategies into Megatron.
"""

from megatron_smar.routing.modalities import (
    PADDING,
    TEXT,
    VISION,
    modality_ids_from_tokens,
    modality_mask_from_ids,
)
from megatron_smar.routing.mrd import layer_distance, modality_routing_distribution, mrd_distance
from megatron_smar.routing.specialization import (
    dropped_share,
    expert_load,
    load_entropy,
    modality_specialization_index,
)
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics, routing_statistics
from megatron_smar.routing.strategies.smar import smar_loss

__all__ = [
    "PADDING",
    "TEXT",
    "VISION",
    "PendingStatistics",
    "RoutingStatistics",
    "dropped_share",
    "expert_load",
    "layer_distance",
    "load_entropy",
    "modality_ids_from_tokens",
    "modality_mask_from_ids",
    "modality_routing_distribution",
    "modality_specialization_index",
    "mrd_distance",
    "routing_statistics",
    "smar_loss",
]
