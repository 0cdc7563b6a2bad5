# SPDX-License-Identifier: Apache-2.0
"""Scalars and images of the experts' load, computed from the counts of each layer and modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_smar.monitoring.config import MonitorConfig
from megatron_smar.monitoring.load_map import load_map
from megatron_smar.routing.specialization import (
    dropped_share,
    expert_load,
    load_entropy,
    modality_specialization_index,
)

MSI = "msi"


def layer_specialization(sums: Tensor) -> dict[int, float]:
    """Returns the Modality Specialization Index by layer number (from 1).

    Layers with tokens of fewer than two modalities are left out.

    Args:
        sums: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
    """
    counts = sums[..., :-1]
    values = modality_specialization_index(expert_load(counts)).tolist()
    comparable = ((counts.sum(dim=-1) > 0).sum(dim=-1) >= 2).tolist()
    return {layer: values[layer - 1] for layer, has_two in enumerate(comparable, start=1) if has_two}


def load_scalars(sums: Tensor, config: MonitorConfig) -> dict[str, float]:
    """Returns the logged scalars of the experts' load, by tag; layers count from 1, absent modalities are left out.

    - `moe/msi_layer_N`: Modality Specialization Index; `msi`: its mean over the layers;
    - `moe/load_entropy_layer_N/<modality>`: entropy of the load, in nats; `moe/load_entropy_share/<modality>`: its mean
      over the layers as a share of log E;
    - `moe/max_load_layer_N/<modality>`: the largest share of the modality's token slots that one expert has;
    - `moe/dropped_layer_N/<modality>`: the share of the modality's slots that was dropped, where capacity is limited;
    - `moe/token_share/<modality>`: the modality's share of all tokens.

    Args:
        sums: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
        config: Config of the monitoring.
    """
    counts, tokens = sums[..., :-1], sums[..., -1]
    load = expert_load(counts)
    entropy = load_entropy(load)
    columns = {"load_entropy": entropy, "max_load": load.amax(dim=-1)}
    if config.capacity_limited:
        columns["dropped"] = dropped_share(counts, tokens, config.top_k)
    indices = layer_specialization(sums)
    scalars = {f"moe/msi_layer_{layer}": value for layer, value in indices.items()}
    if indices:
        scalars[MSI] = fmean(indices.values())
    for layer, modality in (tokens > 0).nonzero().tolist():
        for name, values in columns.items():
            scalars[f"moe/{name}_layer_{layer + 1}/{config.modalities[modality]}"] = float(values[layer, modality])
    for modality in (tokens.sum(dim=0) > 0).nonzero().flatten().tolist():
        name = config.modalities[modality]
        scalars[f"moe/token_share/{name}"] = float(tokens[:, modality].sum() / tokens.sum())
        evenness = entropy[tokens[:, modality] > 0, modality].mean() / math.log(max(load.shape[-1], 2))
        scalars[f"moe/load_entropy_share/{name}"] = float(evenness)
    return scalars


def load_images(sums: Tensor, modalities: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
    """Returns the load of all experts as one heat map per modality, [height, width, 3], by tag `moe/load/<modality>`.

    One image like the paper's Figure 4 instead of a scalar for each of thousands of experts. The color scale is the
    same at every step.

    Args:
        sums: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
        modalities: Names of the M modalities, by id.
    """
    shares = np.array(chosen_share(sums).tolist())
    layers, _, experts = shares.shape
    names = {m: modalities[m] for m in (sums[..., -1].sum(dim=0) > 0).nonzero().flatten().tolist()}
    return {
        f"moe/load/{name}": load_map(layers, experts, f"{name} tokens by expert").draw(shares[:, m])
        for m, name in names.items()
    }


def chosen_share(sums: Tensor) -> Tensor:
    """Returns the share of each modality's tokens that choose each expert, [L, M, E].

    It is K times the load if no token is dropped.

    Args:
        sums: Counts per expert, then tokens, of each layer and modality, [L, M, E + 1].
    """
    counts, tokens = sums[..., :-1], sums[..., -1:]
    return counts / torch.where(tokens > 0, tokens, 1.0)
