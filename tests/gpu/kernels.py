# SPDX-License-Identifier: Apache-2.0
"""Compares single functions on the device with the CPU, or with float64."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.gpu.context import Context, Findings


def compile_function(context: Context, findings: Findings) -> None:
    """The step `compile`: Megatron compiles its fused functions with torch.compile, on every rank."""
    compiled = torch.compile(lambda x: silu(x) * x)
    for size in (999, 4097):  # a second size makes torch compile again, for dynamic sizes
        x = torch.linspace(-4, 4, size, device=context.device)
        expected = silu(x.double()) * x.double()
        # An exp, a division and two products in float32 (6e-8 each), of values up to 16.
        findings.at_most(f"error at {size}", float((compiled(x) - expected).abs().max()), 1e-5)


def attention(context: Context, findings: Findings) -> None:
    """The step `attention`: grouped queries, as in the local layers."""
    from megatron_smar import runtime

    runtime.install()  # it decides which of torch's kernels are used
    _attention_values(context, findings)
    _masked_gradients(context, findings)
    length, heads, groups, width = (256, 8, 2, 32) if context.quick else (4096, 32, 8, 128)
    shape = f"{heads} heads on {groups} groups, {length}"
    half = _qkv(context, 1, heads, groups, length, width, torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        peak = _peak_bytes(context, lambda: _attend(*half))
    findings.note(f"flash, bf16, {shape}", "runs")
    findings.note("bf16 peak MB", peak)
    full = _qkv(context, 1, heads, groups, length, width, torch.float32)
    findings.note("float32 takes", _backends(*full))
    peak = _peak_bytes(context, lambda: _attend(*full))
    findings.note("float32 peak MB", peak)
    findings.note("all scores MB", round(4 * heads * length**2 / 1e6, 1))


def _attention_values(context: Context, findings: Findings) -> None:
    """Compares values and gradients of a small shape with the definition in float64."""
    # bf16: output and probabilities are rounded (2^-9 each), for a gradient twice; a factor of 2 is reserve. float32:
    # sums of 256 products with rounding 6e-8, in a different order.
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float32, 1e-5)):
        given = [tensor.requires_grad_() for tensor in _qkv(context, 2, 8, 2, 256, 64, dtype)]
        exact = [tensor.detach().double().cpu().requires_grad_() for tensor in given]
        out = _attend(*given)
        expected = _attention_in_float64(*exact)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(weight.to(out.device, dtype))
        expected.backward(weight.to(dtype).double())
        findings.at_most(f"{_name(dtype)} error", _relative(out, expected), tolerance)
        errors = [_relative(a.grad, b.grad) for a, b in zip(given, exact, strict=True)]
        findings.at_most(f"{_name(dtype)} gradient error", max(errors), 2 * tolerance)


def _masked_gradients(context: Context, findings: Findings) -> None:
    """Counts gradients that are not finite under a mask, with low scores: cuDNN had some in torch 2.11 to 2.13."""
    findings.at_most("gradients not finite under a mask", _wrong_gradients(context), 0)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            findings.note("the same with cuDNN, which is not used", _wrong_gradients(context))
    except RuntimeError:  # torch's "No available kernel"
        findings.note("the same with cuDNN, which is not used", "no such kernel")


def _wrong_gradients(context: Context) -> int:
    """Returns the number of gradients that are NaN or infinite."""
    length = 192 if context.quick else 704  # 64 more than a multiple of 128
    q, k, v = _qkv(context, 1, 8, 8, length, 64, torch.bfloat16)
    q[..., 0], k[..., 0] = 1, -960  # scores of -120: their exponentials are 0 in float32
    given = [tensor.requires_grad_() for tensor in (q, k, v)]
    mask = torch.ones(length, length, dtype=torch.bool, device=context.device).tril()
    out = scaled_dot_product_attention(*given, attn_mask=mask)
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    return sum(int((~gradient.isfinite()).sum()) for gradient in gradients)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attention_in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _qkv(
    context: Context, batch: int, heads: int, groups: int, length: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, width) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator).to(context.device, dtype) for shape in shapes]


def _backends(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Returns the attention backends that accept these tensors, by trying each separately."""
    able = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                _attend(q, k, v)
        except RuntimeError:  # torch's "No available kernel"
            continue
        able.append(backend.name.lower())
    return ", ".join(able) or "math only"


def _peak_bytes(context: Context, function: Any) -> float | str:
    """Returns the additional peak memory of a call in MB."""
    if context.device == "cpu":
        function()
        return "not counted on the CPU"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def pixels(context: Context, findings: Findings) -> None:
    """The step `pixels`."""
    from megatron_smar.model.vision import NORMALIZATION, normalize

    tiles = torch.randint(0, 256, (4, 3, 448, 448), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, constants in NORMALIZATION.items():
        found = normalize(tiles.to(context.device), *constants).cpu()
        exact = (tiles.double() / 255 - _channels(constants[0])) / _channels(constants[1])
        # One product and one sum, fused or not, of values up to 2.7, where a unit in the last place is 2.4e-7.
        findings.at_most(f"{name}: from the CPU", float((found - normalize(tiles, *constants)).abs().max()), 1e-6)
        findings.at_most(f"{name}: from float64", float((found - exact).abs().max()), 1e-6)


def _channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def routing(context: Context, findings: Findings) -> None:
    """The step `routing`: 2 and 3 modalities, with padding, with and without an absent modality; 8 and 64 experts."""
    worst = {name: 0.0 for dtype in ("float32", "bf16") for name in _routing_names(dtype)}
    counts_differ = 0
    for (experts, top_k), modalities, absent in product(((8, 2), (64, 8)), (2, 3), (False, True)):
        for dtype in (torch.float32, torch.bfloat16):
            weights, chosen, ids = _routed(experts, top_k, modalities, absent, dtype)
            arguments = (modalities, top_k)
            found = _routing_values(
                weights.to(context.device), chosen.to(context.device), ids.to(context.device), *arguments
            )
            exact = _routing_values(weights.double(), chosen, ids, *arguments)
            counts_differ += int((found[0] != exact[0]).sum())
            for name, value, expected in zip(_routing_names(_name(dtype)), found[1:], exact[1:], strict=True):
                worst[name] = max(worst[name], _relative(value, expected))
            if modalities - absent > 1:  # else there is no distance
                compiled = _compiled_values(
                    weights.to(context.device), chosen.to(context.device), ids.to(context.device), *arguments
                )
                for name, value, expected in zip(_compiled_names(_name(dtype)), compiled, exact[3:], strict=True):
                    worst[name] = max(worst.get(name, 0.0), _relative(value, expected))
    findings.at_most("counts that differ", counts_differ, 0)  # sums of ones, exact up to 2^24
    for name, error in worst.items():
        # The statistics are summed in float32 for weights of any dtype, and the reference uses the same rounded
        # weights: sums of 4,096 numbers with rounding 6e-8 each (4e-6), then ratios and logarithms of them. A gradient
        # of bf16 weights is itself rounded to bf16 (2^-9).
        findings.at_most(name, error, 2**-8 if name.startswith("bf16") and name.endswith("gradient") else 1e-4)


def _routing_names(dtype: str) -> tuple[str, ...]:
    return tuple(f"{dtype} {name}" for name in ("weight sums", "distribution", "distance", "loss", "gradient"))


def _compiled_names(dtype: str) -> tuple[str, ...]:
    return tuple(f"{dtype} compiled {name}" for name in ("distance", "loss", "gradient"))


def _routed(
    experts: int, top_k: int, modalities: int, absent: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns top-k weights [N, E], chosen experts [N, E] and modalities [N] of 4,096 tokens, some of them padding."""
    generator = torch.Generator().manual_seed(experts + modalities)
    ids = torch.randint(-1, modalities, (4096,), generator=generator)
    if absent:
        ids[ids == modalities - 1] = 0
    preference = torch.randn(modalities + 1, experts, generator=generator)[ids]  # modalities route differently
    scores = (torch.randn(4096, experts, generator=generator) + preference).softmax(-1)
    top = scores.topk(top_k)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top.indices, True)
    weights = torch.where(chosen, scores, 0)
    return (weights / weights.sum(-1, keepdim=True)).to(dtype), chosen, ids


def _routing_values(weights: Tensor, chosen: Tensor, ids: Tensor, modalities: int, top_k: int) -> list[Tensor]:
    """Returns counts, weight sums, distribution, distance, loss and the loss's gradient, on the host."""
    from megatron_smar.routing import modality_routing_distribution, mrd_distance, routing_statistics
    from megatron_smar.routing.strategies.smar import smar_loss

    weights = weights.requires_grad_()
    statistics = routing_statistics(weights, chosen, ids, modalities)
    mrd = modality_routing_distribution(statistics, top_k)
    distance = mrd_distance(mrd, statistics.tokens > 0)
    loss = smar_loss(distance, 50.0, 60.0)  # far outside the band, so that the gradient is not zero
    # With a single present modality there is no distance and no gradient.
    (gradient,) = torch.autograd.grad(loss, weights) if distance.requires_grad else (torch.zeros_like(weights),)
    values = (statistics.counts, statistics.weights, mrd, distance, loss, gradient)
    return [value.detach().cpu() for value in values]


def _compiled_values(weights: Tensor, chosen: Tensor, ids: Tensor, modalities: int, top_k: int) -> list[Tensor]:
    """Returns distance, loss and the loss's gradient as the router computes them, with compiled functions on a GPU."""
    from megatron_smar.routing.closed_form import distance_in_few_operations, packed_statistics
    from megatron_smar.routing.config import ModalityRoutingConfig
    from megatron_smar.routing.modalities import modality_mask_from_ids
    from megatron_smar.routing.strategies.smar import band_loss

    weights, mask = weights.requires_grad_(), modality_mask_from_ids(ids, modalities)
    _, statistics, _ = packed_statistics(weights, chosen, mask.float(), mask.any(dim=-1, keepdim=True))
    distance, comparable = distance_in_few_operations(statistics, top_k, ModalityRoutingConfig.eps)
    loss = band_loss(distance, comparable, 50.0, 60.0)
    (gradient,) = torch.autograd.grad(loss, weights)
    return [value.detach().cpu() for value in (distance, loss, gradient)]


def _name(dtype: torch.dtype) -> str:
    return "bf16" if dtype is torch.bfloat16 else "float32"


def _relative(found: Any, expected: Any) -> float:
    """Returns the largest deviation relative to the largest value."""
    found, expected = found.detach().double().cpu(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
