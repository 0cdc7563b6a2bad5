# SPDX-License-Identifier: Apache-2.0
"""The cross-entropy of those positions only whose loss counts: in an image's placeholders and in prompts none does.

With 256 vision tokens per tile they are most of a sequence, and their logits the largest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor


def masked_loss(
    *,
    context: Tensor,
    hidden_states: Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: Tensor | None,
    labels: Tensor,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    **_: Any,
) -> Tensor:
    """Computes the loss per token [b, s], 0 at the positions that do not count (GPTModel's `output_processor`).

    Args:
        context: The positions that count, [n], as indices of [s, b], flattened.
        hidden_states: The decoder's output, [s, b, h]; under sequence parallelism [s / tp, b, h].
        output_layer: GPTModel's output layer.
        output_weight: Its weight, where it is tied to the embeddings.
        labels: Target token ids, [b, s].
        compute_language_model_loss: GPTModel's loss of labels [b, s] and logits [s, b, vocabulary / tp].
        scale_logits: GPTModel's scaling of logits.
    """
    rows, columns = labels.shape
    is_sharded = output_layer.sequence_parallel
    if is_sharded:
        # The layer would gather all of the sequence. It gets the chosen positions instead, on every rank the same, and
        # its backward pass sums their gradient over the ranks, so that the gather's only has to split it.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    chosen = hidden_states.flatten(0, 1).index_select(0, context).unsqueeze(1)
    output_layer.sequence_parallel = False
    try:
        logits, _bias = output_layer(chosen, weight=output_weight)
    finally:
        output_layer.sequence_parallel = is_sharded
    targets = labels.t().flatten().index_select(0, context).unsqueeze(0)
    losses = compute_language_model_loss(targets, scale_logits(logits)).flatten()
    return losses.new_zeros(rows * columns).index_put((context,), losses).view(columns, rows).t()
