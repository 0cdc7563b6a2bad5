# SPDX-License-Identifier: Apache-2.0
"""Experts for Megatron's local layer spec (`--transformer-impl local`), which runs without Transformer Engine.

Megatron's own experts, if initialized on the CPU, have the same initial weights on every expert-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class GroupedLinear(torch.autograd.Function):
    """One linear layer per expert over tokens sorted by expert: one matrix product per expert, into one output."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        """Multiplies each token by the weight of its expert.

        Args:
            ctx: Autograd's context.
            tokens: [n, in], sorted by expert.
            splits: Number of tokens of each expert.
            *weights: One weight [out, in] per expert.

        Returns:
            [n, out].
        """
        ctx.save_for_backward(tokens, *weights)
        ctx.splits = splits
        output = tokens.new_empty(tokens.shape[0], weights[0].shape[0])
        for rows, weight, place in zip(tokens.split(splits), weights, output.split(splits), strict=True):
            torch.mm(rows, weight.t(), out=place)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes those gradients with respect to tokens and weights that autograd needs."""
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


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up, expert by expert, while an expert's rows are in the cache.

    Only the input is kept for the backward pass, which writes the gradients of the two halves side by side: autograd
    would keep silu(gate) too, and join the two gradients by a copy.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, splits: list[int]) -> Tensor:
        """Computes the activation.

        Args:
            ctx: Autograd's context.
            hidden: Gate and up, [n, 2 f], sorted by expert.
            splits: Number of rows of each expert.

        Returns:
            [n, f].
        """
        ctx.save_for_backward(hidden)
        ctx.splits = splits
        output = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)
        for rows, place in zip(hidden.split(splits), output.split(splits), strict=True):
            gate, up = rows.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=place)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Computes the gradient with respect to gate and up, [n, 2 f]."""
        (gradient,) = gradients
        (hidden,) = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden)
        parts = (tensor.split(ctx.splits) for tensor in (gradient, hidden, by_hidden))
        for part, rows, place in zip(*parts, strict=True):
            gate, up = rows.chunk(2, dim=-1)
            by_gate, by_up = place.chunk(2, dim=-1)
            torch.ops.aten.silu_backward.grad_input(part * up, gate, grad_input=by_gate)
            torch.mul(part, F.silu(gate), out=by_up)
        return by_hidden, None


def _weight_gradient(weight: Any, gradient: Tensor, tokens: Tensor) -> Tensor:
    """Computes a weight's gradient [out, in]; under Megatron's DDP it goes into the gradient buffer immediately.

    Megatron's own linear layers do the same.
    """
    if not hasattr(weight, "grad_added_to_main_grad") or weight.main_grad.dtype != gradient.dtype:
        return gradient.t() @ tokens
    weight.main_grad.addmm_(gradient.t(), tokens)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)  # so that DDP's hook is called, which ignores the value


class LocalExperts(SequentialMLP):
    """Megatron's experts with one activation for all experts, and initialized independently of the parallel layout.

    With CPU initialization Megatron 0.19.2 initializes the experts of all expert-parallel ranks from the same generator
    state, so that expert 0 of each rank gets the same weights, and a different number of ranks gives a different model.
    Here each expert has its own seed, derived from one random number per layer.
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
                    self._initialize(expert)
        for expert in self.local_experts:
            # Megatron adds the bias in place, which torch forbids on a tensor that a custom Function returned.
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
        """Applies the experts to their tokens, as Megatron's forward does.

        Args:
            permuted_local_hidden_states: Tokens [n, h], sorted by expert.
            tokens_per_expert: Number of tokens of each expert.
            permuted_probs: Routing weights of the tokens [n].

        Returns:
            The weighted outputs [n, h], and None for the bias.
        """
        if not self._gated_silu:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        splits = tokens_per_expert.tolist()
        hidden = self._grouped("linear_fc1", permuted_local_hidden_states, splits)
        output = self._grouped("linear_fc2", GatedSilu.apply(hidden, splits), splits)
        # The routing weight commutes with the second layer; it is applied there, where tokens have fewer channels.
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), None

    def _grouped(self, name: str, tokens: Tensor, splits: list[int]) -> Tensor:
        linears = [getattr(expert, name) for expert in self.local_experts]
        for linear in linears:  # --overlap-param-gather waits for a weight in its module's forward pre-hook
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        return GroupedLinear.apply(tokens, splits, *(linear.weight for linear in linears))

    def _initialize(self, expert: Any) -> None:
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
