# SPDX-License-Identifier: Apache-2.0
"""Better parts for Megatron's local layer spec (`--transformer-impl local`), which runs without Transformer Engine.

Megatron's own local attention materialises the scores, its local norms refuse sequence parallelism, and its experts,
drawn on the CPU, start out equal on every expert-parallel rank. These plug into the same places of the spec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def zigzag_positions(
    lengths: Sequence[int] | int, context_parallel_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Positions that each context-parallel rank holds, [cp, s / cp], in its order.

    Megatron cuts a sequence into 2 cp chunks and gives rank r chunks r and 2 cp - 1 - r, so that all have as much to do
    under a causal mask (`megatron.core.utils.get_batch_on_this_cp_rank`); each sequence of a pack is cut by itself, as
    Transformer Engine expects.

    Args:
        lengths: Length of the sequence, or of each sequence of a pack; multiples of 2 cp.
        context_parallel_size: cp.
        device: Where the result lies.
    """
    parts, first = [], 0
    for length in [lengths] if isinstance(lengths, int) else lengths:
        chunks = torch.arange(first, first + length, device=device).view(2 * context_parallel_size, -1)
        parts.append(torch.cat([chunks[:context_parallel_size], chunks.flip(0)[:context_parallel_size]], dim=1))
        first += length
    return torch.cat(parts, dim=1)


class ScaledDotProductAttention(MegatronModule):
    """Core attention by torch's `scaled_dot_product_attention`: causal, grouped queries, no score matrix in memory.

    Under context parallelism keys and values are gathered from all ranks: exact, and plain rather than lean. Long
    sequences on GPUs are for Transformer Engine's ring.
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
        """Attention of one layer's heads on this tensor-parallel rank.

        Args:
            query: [s, b, n, d]; packed [s, n, d].
            key: [s, b, g, d], g query groups; packed [s, g, d].
            value: As `key`.
            attention_mask: None for the causal mask, else [b, 1, s, s] bool, True where masked (Megatron's polarity).
            attn_mask_type: Overrides the layer's own type.
            attention_bias: Not supported.
            packed_seq_params: Where the sequences of a pack begin, best on the host, or this waits for the device; each
                attends to itself alone, causally.

        Returns:
            [s, b, n * d], packed [s, n * d].
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
        """Block-diagonal causal attention: one sequence of the pack after another, [s, 1, n * d]."""
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
        """Attention [s, b, n * d] under a causal mask, or of what `kept`, broadcast to [b, n, s, keys], is True for."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
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
        return context.permute(2, 0, 1, 3).flatten(2)

    def _mask_of_shard(self, keys: Tensor, causal: bool, attention_mask: Tensor | None) -> Tensor:
        """Which of all ranks' keys, in the order they are gathered in, this rank's queries see, [s / cp, s] bool."""
        if not causal and attention_mask is not None:
            raise ValueError(
                "attention masks with --context-parallel-size > 1 need Transformer Engine's attention; "
                "use --transformer-impl transformer_engine."
            )
        positions = zigzag_positions(keys.shape[0], self.cp_group.size(), keys.device)
        visible = positions[self.cp_group.rank()].unsqueeze(1) >= positions.flatten().unsqueeze(0)
        return visible if causal else torch.ones_like(visible)

    def _dropout_generator(self) -> Any:
        """Tensor-parallel ranks hold different heads, so their dropout must differ."""
        if self.training and self.dropout > 0 and not self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> nn.Module:
    """torch's RMSNorm or LayerNorm, with its parameters marked for sequence parallelism.

    Megatron sums the gradients of marked parameters over the tensor-parallel ranks, each of which sees a shard of the
    sequence: that mark is all that the local norms lacked.

    Raises:
        ValueError: For a normalization that torch has no module of.
    """
    norms = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}
    if config.normalization not in norms or config.layernorm_zero_centered_gamma:
        raise ValueError(
            f"--normalization {config.normalization} (zero-centred: {config.layernorm_zero_centered_gamma}) is not in "
            "the local layers; use RMSNorm or LayerNorm, or --transformer-impl transformer_engine."
        )
    norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


class GroupedLinear(torch.autograd.Function):
    """One linear layer per expert over tokens sorted by expert: a matrix product each, into one output."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        """Tokens [n, in], the number of each expert's, and one weight [out, in] per expert -> [n, out]."""
        ctx.save_for_backward(tokens, *weights)
        ctx.splits = splits
        output = tokens.new_empty(tokens.shape[0], weights[0].shape[0])
        for rows, weight, place in zip(tokens.split(splits), weights, output.split(splits), strict=True):
            torch.mm(rows, weight.t(), out=place)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by tokens and weights that something wants."""
        (gradient,) = gradients
        tokens, *weights = ctx.saved_tensors
        parts = gradient.split(ctx.splits)
        by_tokens = None
        if ctx.needs_input_grad[0]:
            by_tokens = torch.empty_like(tokens)
            for part, weight, place in zip(parts, weights, by_tokens.split(ctx.splits), strict=True):
                torch.mm(part, weight, out=place)
        wanted = ctx.needs_input_grad[2:]
        by_weights = [
            _weight_gradient(weight, part, rows) if wants else None
            for weight, part, rows, wants in zip(weights, parts, tokens.split(ctx.splits), wanted, strict=True)
        ]
        return by_tokens, None, *by_weights


def _weight_gradient(weight: Any, gradient: Tensor, tokens: Tensor) -> Tensor:
    """The gradient by a weight [out, in]; under Megatron's DDP added to its buffer at once, as its own linears do."""
    if not hasattr(weight, "grad_added_to_main_grad") or weight.main_grad.dtype != gradient.dtype:
        return gradient.t() @ tokens
    weight.main_grad.addmm_(gradient.t(), tokens)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)  # DDP's hook has to be called, and then does not look at it


class LocalExperts(SequentialMLP):
    """Megatron's experts with their activation computed at once, and drawn independently of the layout.

    Under CPU initialisation Megatron 0.19.2 draws every expert-parallel rank's experts from one generator state, so
    that expert 0 of each rank starts as the same network, and a different number of ranks gives a different model. Here
    each expert has a seed of its own, taken from the layer's place in the generator's sequence.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        seed = int(torch.randint(2**31, (1,), device="cpu"))
        with torch.random.fork_rng(devices=[]):
            super().__init__(num_local_experts, config, submodules, pg_collection, name)
            if config.use_cpu_initialization and config.perform_initialization:
                first = self.ep_group.rank() * num_local_experts
                for index, expert in enumerate(self.local_experts, start=first):
                    torch.manual_seed(seed + index)
                    self._draw(expert)
        for expert in self.local_experts:
            # Megatron adds the bias in place, which torch forbids to what a Function returned as it is.
            expert.linear_fc2.register_forward_hook(lambda _, __, output: (output[0].clone(), output[1]))
        linears = [linear for expert in self.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)]
        self._gated_silu = (
            self.config.gated_linear_unit
            and self.config.activation_func is F.silu
            and self.config.activation_func_clamp_value is None
            and self.config.glu_linear_offset == 0
            and not self.config.moe_apply_probs_on_input
            and not (self.config.fp8 or self.config.fp4)
            and all(linear.bias is None for linear in linears)
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: tokens [n, h] sorted by expert, the number of each, and their weights [n] -> [n, h]."""
        if not self._gated_silu:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        splits = tokens_per_expert.tolist()
        hidden = self._grouped("linear_fc1", permuted_local_hidden_states, splits)
        gate, up = hidden.chunk(2, dim=-1)
        output = self._grouped("linear_fc2", F.silu(gate) * up, splits)
        # A token's weight commutes with the second layer, whose output is narrower than its input.
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), None

    def _grouped(self, name: str, tokens: Tensor, splits: list[int]) -> Tensor:
        linears = [getattr(expert, name) for expert in self.local_experts]
        for linear in linears:  # --overlap-param-gather waits for a weight in a hook before its module's own forward
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        return GroupedLinear.apply(tokens, splits, *(linear.weight for linear in linears))

    def _draw(self, expert: Any) -> None:
        place = {
            "rank": self.tp_group.rank(),
            "world_size": self.tp_group.size(),
            "skip_set_tensor_parallel_attributes": True,
        }
        fc1, fc2 = expert.linear_fc1, expert.linear_fc2
        for linear, dim, init in ((fc1, 0, self.config.init_method), (fc2, 1, self.config.output_layer_init_method)):
            _initialize_affine_weight_cpu(
                linear.weight,
                linear.output_size,
                linear.input_size,
                linear.weight.shape[dim],
                dim,
                init,
                params_dtype=self.config.params_dtype,
                **place,
            )
