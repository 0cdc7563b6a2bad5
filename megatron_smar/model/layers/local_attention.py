# SPDX-License-Identifier: Apache-2.0
"""Attention for Megatron's local layer spec (`--transformer-impl local`), which runs without Transformer Engine.

Megatron's own local attention keeps the full score matrix in memory.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smar.model.context_parallel import zigzag_positions


class LocalSelfAttention(SelfAttention):
    """Megatron's self-attention, with one rotation for all sequences of a pack instead of one for each.

    Megatron rotates a pack at once if the angles of every position are given, and else sequence by sequence, in tens of
    small operations for each.
    """

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Computes attention of [s, b, h]; arguments are those of Megatron's forward."""
        if packed_seq_params is not None and isinstance(rotary_pos_emb, Tensor) and not self.config.apply_rope_fusion:
            rotary_pos_emb = rotary_pos_emb[_positions_in_sequences(packed_seq_params, rotary_pos_emb.device)]
        output: tuple[Tensor, Tensor | None] = super().forward(
            *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs
        )
        return output


def _positions_in_sequences(packed: PackedSeqParams, device: torch.device) -> Tensor:
    """Returns for each position of a pack, before context-parallel sharding, its position in its sequence, [t]."""
    positions = torch.cat([torch.arange(length) for length in packed.cu_seqlens_q.diff().tolist()])
    # From pinned memory the copy does not block.
    return positions if device.type == "cpu" else positions.pin_memory().to(device, non_blocking=True)


class ScaledDotProductAttention(MegatronModule):
    """Core attention with torch's `scaled_dot_product_attention`: causal, grouped queries, no score matrix in memory.

    Under context parallelism, keys and values are gathered from all ranks. This is exact and simple, but takes more
    memory than a ring; for long sequences on GPUs use Transformer Engine's ring attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])).cp
        if config.window_size is not None:
            raise ValueError(
                "--window-size needs Transformer Engine's attention; use --transformer-impl transformer_engine."
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Computes the attention of one layer's heads on this tensor-parallel rank.

        Args:
            query: [s, b, n, d]; packed [s, n, d].
            key: [s, b, g, d] with g query groups; packed [s, g, d].
            value: Same shape as `key`, or with fewer numbers per head, v.
            attention_mask: None for the causal mask, else [b, 1, s, s] bool, True where masked (Megatron's polarity).
            attn_mask_type: Overrides the layer's mask type.
            attention_bias: Not supported.
            packed_seq_params: Boundaries of the sequences of a pack. They should be on the host: otherwise every call
                waits for the device. Each sequence attends only to itself, causally.

        Returns:
            [s, b, n * v], packed [s, n * v].
        """
        if attention_bias is not None:
            raise ValueError(
                "attention biases need Transformer Engine's attention; use --transformer-impl transformer_engine."
            )
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.cu_seqlens_q.diff().tolist()).squeeze(1)
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        kept = None if causal or attention_mask is None else ~attention_mask
        if self.cp_group.size() > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
            kept, causal = self._mask_of_shard(key, causal, attention_mask), False
        return self._attend(query, key, value, kept, causal)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Computes block-diagonal causal attention, one sequence of the pack after another, [s, 1, n * v]."""
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
            return torch.cat([self._attend(q, k, v, None, True) for q, k, v in parts])
        positions = zigzag_positions(lengths, size, key.device)
        key, value = (
            gather_from_sequence_parallel_region(x, group=self.cp_group)[positions.flatten().argsort()]
            for x in (key, value)
        )
        shares = [length // size for length in lengths]
        queries = zip(*(x.split(shares) for x in (query, positions[rank])), strict=True)
        keys = zip(*(x.split(lengths) for x in (key, value)), strict=True)
        outputs, first = [], 0
        for (q, own), (k, v) in zip(queries, keys, strict=True):
            visible = own.unsqueeze(1) >= torch.arange(first, first + len(k), device=own.device)
            outputs.append(self._attend(q, k, v, visible, False))
            first += len(k)
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, causal: bool) -> Tensor:
        """Computes attention, [s, b, n * v], causally or over the keys where `kept` [b, n, s, keys] is True."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if kept is not None and (repeats := query.shape[1] // key.shape[1]) > 1:
            # torch's CUDA kernels that take a mask take no groups; plain products would store all scores.
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        size = value.shape[-1]
        if size < key.shape[-1]:
            # Of latent attention. Without a kernel for two sizes torch would store all scores.
            value = F.pad(value, (0, key.shape[-1] - size))
        with self._dropout_generator():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=kept,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        return context[..., :size].permute(2, 0, 1, 3).flatten(2)

    def _mask_of_shard(self, keys: Tensor, causal: bool, attention_mask: Tensor | None) -> Tensor:
        """Returns which keys this rank's queries attend to, [s / cp, s] bool; keys are in the order of gathering."""
        if not causal and attention_mask is not None:
            raise ValueError(
                "attention masks with --context-parallel-size > 1 need Transformer Engine's attention; "
                "use --transformer-impl transformer_engine."
            )
        positions = zigzag_positions(keys.shape[0], self.cp_group.size(), keys.device)
        visible = positions[self.cp_group.rank()].unsqueeze(1) >= positions.flatten().unsqueeze(0)
        return visible if causal else torch.ones_like(visible)

    def _dropout_generator(self) -> Any:
        """Returns the context of the dropout's generator: tensor-parallel ranks hold different heads, so it differs."""
        if self.training and self.dropout > 0 and not self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()
