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


class GatedExperts(torch.autograd.Function):
    """The experts' two linear layers and silu(gate) * up between them, over tokens sorted by expert.

    Expert by expert, so that what an operation writes is still in the cache when the next one reads it; torch's
    operations over all experts would write it to memory first. Only tokens, gates and ups are kept for the backward
    pass, which computes silu(gate) * up again from silu(gate), of which it needs the derivative anyway.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, splits: list[int], *weights: Tensor) -> Tensor:
        """Applies to each token the expert that it is sorted under.

        Args:
            ctx: Autograd's context.
            tokens: [n, h], sorted by expert.
            splits: Number of tokens of each expert.
            *weights: The first layer's weight of each expert, gate above up [2 f, h], then the second layer's [h, f].

        Returns:
            [n, h].
        """
        first, second = weights[: len(splits)], weights[len(splits) :]
        hidden = tokens.new_empty(len(tokens), len(first[0]))
        output = tokens.new_empty(len(tokens), len(second[0]))
        activated = tokens.new_empty(max(splits), second[0].shape[1])
        each = zip(*(tensor.split(splits) for tensor in (tokens, hidden, output)), first, second, strict=True)
        for rows, between, place, weight1, weight2 in each:
            gate, up = torch.mm(rows, weight1.t(), out=between).chunk(2, dim=-1)
            inner = activated[: len(rows)]
            torch.mul(torch.ops.aten.silu.out(gate, out=inner), up, out=inner)
            torch.mm(inner, weight2.t(), out=place)
        ctx.save_for_backward(tokens, hidden, *weights)
        ctx.splits = splits
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes those gradients with respect to tokens and weights that autograd needs."""
        (gradient,) = gradients
        tokens, hidden, *weights = ctx.saved_tensors
        splits, wanted = ctx.splits, ctx.needs_input_grad
        number, most = len(splits), max(splits)
        by_tokens = torch.empty_like(tokens) if wanted[0] else None
        by_weights: list[Tensor | None] = [None] * len(weights)
        activated, inner = tokens.new_empty(2, most, hidden.shape[1] // 2).unbind()
        by_hidden = tokens.new_empty(most, hidden.shape[1])
        places = [None] * number if by_tokens is None else by_tokens.split(splits)
        each = zip(*(tensor.split(splits) for tensor in (tokens, hidden, gradient)), places, strict=True)
        for expert, (rows, between, part, place) in enumerate(each):
            weight1, weight2 = weights[expert], weights[number + expert]
            gate, up = between.chunk(2, dim=-1)
            silu, product, by_between = (buffer[: len(rows)] for buffer in (activated, inner, by_hidden))
            torch.ops.aten.silu.out(gate, out=silu)
            if wanted[2 + number + expert]:
                by_weights[number + expert] = _weight_gradient(weight2, part, torch.mul(silu, up, out=product))
            torch.mm(part, weight2, out=product)  # now its gradient
            by_gate, by_up = by_between.chunk(2, dim=-1)
            torch.mul(product, silu, out=by_up)
            torch.ops.aten.silu_backward.grad_input(product.mul_(up), gate, grad_input=by_gate)
            if wanted[2 + expert]:
                by_weights[expert] = _weight_gradient(weight1, by_between, rows)
            if place is not None:
                torch.mm(by_between, weight1, out=place)
        return by_tokens, None, *by_weights


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
    """Megatron's experts, each computed in one go, and initialized independently of the parallel layout.

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
        linears = [getattr(expert, name) for name in ("linear_fc1", "linear_fc2") for expert in self.local_experts]
        for linear in linears:  # --overlap-param-gather waits for a weight in its module's forward pre-hook
            for hook in linear._forward_pre_hooks.values():
                hook(linear, ())
        output = GatedExperts.apply(permuted_local_hidden_states, splits, *(linear.weight for linear in linears))
        # The routing weight commutes with the second layer; it is applied there, where tokens have fewer channels.
        return (output * permuted_probs.unsqueeze(-1)).to(output.dtype), None

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
