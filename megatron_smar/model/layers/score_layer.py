# SPDX-License-Identifier: Apache-2.0
"""Decoder layers that accumulate soft modality scores along their attention (SMoES, arXiv 2604.23996, section 3).

A layer receives scores M^l and returns M^{l+1}; its router uses M^l. Megatron's `context` argument, which layers of a
decoder without cross-attention leave alone, carries the scores from layer to layer and through recomputation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_smar.model.layers.parallel_block import ParallelBlockLayer
from megatron_smar.routing.soft_scores import scores_after_attention
from megatron_smar.routing.token_columns import with_scores


class AccumulatesScores(TransformerLayer):
    """A layer whose `context` is soft modality scores; without it, the layer is Megatron's.

    The attention is applied to the scores by a second call of the layer's own core attention with the same queries and
    keys, and the scores as values (padded to the values' width). So grouped queries, multi-latent attention, packs,
    context parallelism and any kernel give the scores the attention weights that the layer itself uses, and no
    attention matrix is formed. Appended to the values instead, the scores would change the head size to one that fused
    kernels do not have. The second call has no dropout and no backward pass.

    Attributes:
        last_scores: M^{l+1} of the latest pass, [s, b, M]; the model takes it from the last layer of a pipeline stage.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last_scores: Tensor | None = None
        self._scores: Tensor | None = None  # M^l of the pass that is running, [s, b, M]
        self._attended: Tensor | None = None  # its product with the attention, [s, b, M]
        self._attention_output: Tensor | None = None  # [s, b, h]
        self.self_attention.core_attention.register_forward_hook(self._attend_to_scores, with_kwargs=True)
        self.self_attention.register_forward_hook(self._keep_output)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        context: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Maps hidden states and scores to those of the next layer.

        Args:
            hidden_states: [s, b, h].
            *args: Positional arguments of Megatron's layer.
            context: M^l, [s, b, M].
            padding_mask: Columns [b, s, M + 2] of `routing.token_columns`.
            **kwargs: Keyword arguments of Megatron's layer.

        Returns:
            Hidden states [s, b, h] and M^{l+1}, [s, b, M].
        """
        if context is None:
            return super().forward(hidden_states, *args, padding_mask=padding_mask, **kwargs)
        assert padding_mask is not None
        scores = context.detach()
        self._scores = scores
        try:
            columns = with_scores(padding_mask, scores)
            output, _ = super().forward(hidden_states, *args, padding_mask=columns, **kwargs)
            assert self._attended is not None and self._attention_output is not None
            with torch.no_grad():
                following = scores_after_attention(scores, self._attended, hidden_states, self._attention_output)
        finally:
            self._scores = self._attended = self._attention_output = None
        self.last_scores = following
        return output, following

    def _attend_to_scores(
        self, core: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Applies the core attention to the scores, after it was applied to the values.

        When only the attention is recomputed, in the backward pass, the layer has no scores and nothing is done.
        """
        scores, self._scores = self._scores, None  # not again in the call below
        if scores is None:
            return
        query, key, value, *others = inputs
        group = self.pg_collection.tp
        with torch.no_grad():
            if self.config.sequence_parallel:  # each tensor-parallel rank attends with its own heads to all positions
                scores = gather_from_sequence_parallel_region(scores, group=group)
            values = _as_values(scores, value)
            core.eval()  # without dropout
            attended = core(query, key, values, *others, **kwargs)
            core.train(self.training)
            per_head = attended.reshape(*scores.shape[:2], -1, values.shape[-1])[..., : scores.shape[-1]]
            mean = per_head.to(scores.dtype).mean(dim=2)
            if self.config.sequence_parallel:
                mean = reduce_scatter_to_sequence_parallel_region(mean, group=group) / group.size()
            elif group.size() > 1:
                dist.all_reduce(mean, group=group)
                mean = mean / group.size()
        self._attended = mean

    def _keep_output(self, attention: torch.nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        """Keeps the attention output, bias included, whose norm the update of the scores needs."""
        if self._attended is not None:
            context, bias = output
            self._attention_output = context.detach() if bias is None else (context + bias).detach()


def _as_values(scores: Tensor, value: Tensor) -> Tensor:
    """Returns scores [s, b, M] in the shape and precision of an attention's values, the same for each head.

    Args:
        scores: [s, b, M].
        value: [s, b, g, d]; packed [s, g, d].
    """
    values = value.new_zeros(*scores.shape[:2], value.shape[-2], max(value.shape[-1], scores.shape[-1]))
    values[..., : scores.shape[-1]] = scores.unsqueeze(2)
    return values.view(*value.shape[:-1], -1)


class ScoreLayer(AccumulatesScores):
    """Megatron's layer, with scores."""


class ScoreParallelBlockLayer(AccumulatesScores, ParallelBlockLayer):
    """Phi's layer, with scores."""


SCORE_LAYERS: dict[type, type[AccumulatesScores]] = {
    TransformerLayer: ScoreLayer,
    ParallelBlockLayer: ScoreParallelBlockLayer,
}
