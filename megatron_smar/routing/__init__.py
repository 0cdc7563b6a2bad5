# SPDX-License-Identifier: Apache-2.0
"""Modality-aware routing.

`modalities`, `statistics` and `mrd` are SMAR's mathematics, equation by equation; `bins` and `soft_scores` are SMoES's.
They need only torch, as do the measures in `specialization`. `strategies` has one file per published routing; `router`
and `moe_layer` integrate the strategies into Megatron.
"""

from megatron_smar.routing.bins import expert_bins, inter_bin_mutual_information, intra_bin_balance
from megatron_smar.routing.modalities import (
    PADDING,
    TEXT,
    VISION,
    modality_ids_from_tokens,
    modality_mask_from_ids,
)
from megatron_smar.routing.mrd import layer_distance, modality_routing_distribution, mrd_distance
from megatron_smar.routing.soft_scores import blend_attention_scores, gaussian_modality_scores
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
    "blend_attention_scores",
    "dropped_share",
    "expert_bins",
    "expert_load",
    "gaussian_modality_scores",
    "inter_bin_mutual_information",
    "intra_bin_balance",
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
