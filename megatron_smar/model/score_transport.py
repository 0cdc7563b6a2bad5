# SPDX-License-Identifier: Apache-2.0
"""Sends soft modality scores from one pipeline stage to the next, as extra columns of the activations.

Megatron's schedules exchange one tensor per stage and micro-batch, of the width that the model's config names. Scores
are float32 (or float64 in a float64 model), and bf16 columns hold their bits, two to a score, so nothing is rounded.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def score_dtype(activations: torch.dtype) -> torch.dtype:
    """Returns the data type of scores sent with activations of the given data type."""
    return torch.promote_types(activations, torch.float32)


def score_columns(num_modalities: int, activations: torch.dtype) -> int:
    """Returns the number of columns that the scores of a token take in a tensor of activations."""
    return num_modalities * score_dtype(activations).itemsize // activations.itemsize


def append_scores(activations: Tensor, scores: Tensor) -> Tensor:
    """Returns activations [s, b, h] with the bits of scores [s, b, M] as further columns."""
    return torch.cat([activations, scores.contiguous().view(activations.dtype)], dim=-1)


def split_scores(received: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """Splits what a stage received into activations [s, b, h] and scores [s, b, M]."""
    scores = received.detach()[..., hidden_size:].contiguous().view(score_dtype(received.dtype))
    return received[..., :hidden_size].contiguous(), scores


def with_wider_activations(config: TransformerConfig, columns: int) -> TransformerConfig:
    """Returns a view of a config whose hidden size is larger; every other setting is shared with `config`.

    The model has the view, from which schedules read the width of the tensors that stages exchange, and its layers have
    `config`. What Megatron sets on the one is set on the other.
    """

    class WiderActivations(type(config)):  # type: ignore[misc]
        """The config of the model's layers, with a hidden size that includes the columns of the scores."""

        hidden_size = property(lambda self: config.hidden_size + columns)

    view: TransformerConfig = object.__new__(WiderActivations)
    view.__dict__ = config.__dict__
    return view
