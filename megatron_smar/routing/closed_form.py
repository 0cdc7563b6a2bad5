# SPDX-License-Identifier: Apache-2.0
"""SMAR's equations 5 to 12 with their derivatives written out, in few operations: each is a kernel launch on a GPU.

`statistics` and `mrd` are the same mathematics, equation by equation, and the tests compare the two. Autograd would
launch about as many small kernels again for the backward pass as the forward pass has; here each backward pass is a
formula. On a GPU the formulas are compiled (`fusion`). Nothing here synchronizes the host with the device.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_smar.routing.fusion import FusedFunction, constant, to_device
from megatron_smar.routing.mrd import layer_distance
from megatron_smar.routing.statistics import RoutingStatistics

# Largest M for which the set of present modalities indexes a table of 2^M rows.
TABLE_MODALITIES = 8
# Added to each product of Eq. 8, so that the row of a modality without tokens is uniform instead of 0 / 0.
NOTHING = 1e-30


@FusedFunction
def _divided_by_sum(probs: Tensor) -> tuple[Tensor, Tensor]:
    # Only a token that lost all its experts has a smaller sum; the square of its reciprocal must be finite.
    total = probs.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny ** 0.5)
    return probs / total, total


@FusedFunction
def _gradient_of_division(gradient: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    return (gradient - (gradient * weights).sum(dim=-1, keepdim=True)) / total


class _Renormalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor) -> Tensor:
        weights, total = _divided_by_sum(probs)
        ctx.save_for_backward(weights, total)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _gradient_of_division(gradient, *ctx.saved_tensors)


def renormalized(probs: Tensor) -> Tensor:
    """Returns the weights of the chosen experts divided by their sum (Eq. 5), [N, E]; 0 where all are 0."""
    result: Tensor = _Renormalized.apply(probs)
    return result


class _TokenSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, routing_map: Tensor, one_hot: Tensor, real: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns = torch.cat([weights, routing_map, real], dim=1).to(one_hot.dtype)
        packed = one_hot.t() @ columns
        ctx.save_for_backward(one_hot)
        ctx.dtype = weights.dtype
        ctx.mark_non_differentiable(packed)
        ctx.set_materialize_grads(False)
        return weights, packed[:, : weights.shape[1]], packed

    @staticmethod
    def backward(
        ctx: Any, of_weights: Tensor | None, of_sums: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        (one_hot,) = ctx.saved_tensors
        if of_sums is None:
            return of_weights, None, None, None
        if of_weights is None:
            return (one_hot @ of_sums).to(ctx.dtype), None, None, None
        return torch.addmm(of_weights.to(one_hot.dtype), one_hot, of_sums).to(ctx.dtype), None, None, None


def packed_statistics(
    weights: Tensor, routing_map: Tensor, one_hot: Tensor, real: Tensor
) -> tuple[Tensor, RoutingStatistics, Tensor]:
    """Returns the sums of equations 6 and 7 over this rank's tokens, from one matrix product.

    Args:
        weights: Renormalized top-k weights (Eq. 5), [N, E].
        routing_map: The chosen experts, [N, E] bool.
        one_hot: One-hot modalities, [N, M], float; all 0 for padding.
        real: Whether each position is a token and not padding, [N, 1] bool.

    Returns:
        (weights, statistics, packed). The weights are unchanged; where these are used instead of the argument, both
        parts of their gradient are added in the one matrix product of the backward pass. `packed`, [M, 2E + 1], is the
        memory of the statistics: weights, counts, tokens. A reduction of it in place makes them global.
    """
    same, sums, packed = _TokenSums.apply(weights, routing_map, one_hot, real)
    return same, RoutingStatistics.unpack(packed)._replace(weights=sums), packed


@lru_cache(maxsize=64)
def _pairs(modalities: int, scale: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the distance needs that does not depend on the routing.

    For n modalities that are present, with u = 1 where present, the mean over their pairs is a quadratic form:

        2 / (n (n - 1)) sum_{i<j} (p_i - p_j) (l_i - l_j) / 2 = sum_i p_i (A l)_i,  A = (diag(u) - u u^T / n) / (n - 1)

    Returns:
        (table, places, nothing): for each set of present modalities the elements of `scale` times A and then 1 if
        n >= 2, else zeros, [2^M, M^2 + 1]; the value of each modality's bit in the row's index, [M]; `NOTHING`, [].
    """
    rows = []
    for bits in product((0.0, 1.0), repeat=modalities):
        present = torch.tensor(bits, dtype=torch.float64, device="cpu")
        number = present.sum()
        form = (present.diag() - torch.outer(present, present) / number.clamp(min=1)) / (number - 1).clamp(min=1)
        comparable = (number >= 2).to(form.dtype)
        rows.append(torch.cat([scale * comparable * form.flatten(), comparable.view(1)]))
    places = [2.0**place for place in reversed(range(modalities))]  # `product` varies the last modality first
    numbers = constant((*places, NOTHING), dtype, device)
    return to_device(torch.stack(rows).to(dtype), device), numbers[:-1], numbers[-1]


class _DistanceTensors(NamedTuple):
    """The distance, whether it is defined, and what its gradient needs."""

    distance: Tensor
    comparable: Tensor
    mass: Tensor
    normalized: Tensor
    smoothed: Tensor
    of_logs: Tensor
    of_smoothed: Tensor


def _small_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right; compiled, without a kernel of its own as a matrix product would have."""
    if torch.compiler.is_compiling():
        return (left.unsqueeze(2) * right.unsqueeze(0)).sum(dim=1)
    return left @ right


@FusedFunction
def _distance(
    counts: Tensor, weights: Tensor, tokens: Tensor, table: Tensor, places: Tensor, nothing: Tensor, eps: float
) -> _DistanceTensors:
    modalities = len(counts)
    mass = torch.addcmul(nothing, counts, weights)  # Eq. 8; K and the tokens of Eq. 6 and 7 cancel in Eq. 9
    normalized = mass / mass.sum(dim=1, keepdim=True)
    smoothed = normalized + eps
    present = torch.dot(tokens.clamp(max=1), places)
    row = table.index_select(0, present.long().unsqueeze(0)).squeeze(0)
    form = row[:-1].view(modalities, modalities)
    of_logs, of_smoothed = _small_product(form, smoothed.log()), _small_product(form, smoothed)
    distance = torch.dot(smoothed.flatten(), of_logs.flatten())
    return _DistanceTensors(distance, row[-1], mass, normalized, smoothed, of_logs, of_smoothed)


@FusedFunction
def _gradient_of_distance(
    gradient: Tensor,
    counts: Tensor,
    mass: Tensor,
    normalized: Tensor,
    smoothed: Tensor,
    of_logs: Tensor,
    of_smoothed: Tensor,
) -> Tensor:
    of_normalized = torch.addcdiv(of_logs, of_smoothed, smoothed)
    # The derivative by log(mass), through Q = softmax(log(mass)), is torch's own backward pass of softmax.
    of_log_mass = torch.ops.aten._softmax_backward_data(of_normalized, normalized, 1, normalized.dtype)
    return of_log_mass * counts / mass * gradient


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: Tensor, weights: Tensor, tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        modalities, experts = counts.shape
        # (Q + eps) / (1 + E eps): the divisor is the same in all rows, so it cancels in the difference of logarithms.
        constants = _pairs(modalities, 1.0 / (1.0 + experts * eps), counts.dtype, counts.device)
        distance, comparable, *saved = _distance(counts, weights, tokens, *constants, eps)
        ctx.save_for_backward(counts, *saved)
        ctx.mark_non_differentiable(comparable)
        ctx.set_materialize_grads(False)  # else a gradient of zeros is made for `comparable`
        return distance, comparable

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[None, Tensor | None, None, None]:
        if gradient is None:
            return None, None, None, None
        return None, _gradient_of_distance(gradient, *ctx.saved_tensors), None, None


def distance_in_few_operations(statistics: RoutingStatistics, top_k: int, eps: float) -> tuple[Tensor, Tensor]:
    """Same as `mrd.layer_distance`, value and gradient, in 12 operations forward and 5 backward (compiled: 3 and 1)."""
    counts, weights, tokens = statistics
    if len(counts) < 2 or len(counts) > TABLE_MODALITIES:
        return layer_distance(statistics, top_k, eps)
    distance, comparable = _Distance.apply(counts, weights, tokens, eps)
    return distance, comparable
