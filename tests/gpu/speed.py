# SPDX-License-Identifier: Apache-2.0
"""Tokens per second and model FLOPs utilization, compared with transformers' own model in a plain loop, in bf16."""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable

from tests.gpu.context import Context, Findings

# Dense bf16 FLOP/s from NVIDIA's data sheets (without sparsity), by words in torch's name of the GPU; first match.
PEAKS: dict[str, float] = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "RTX A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
SIZES = argparse.Namespace(
    hidden_size=1024, ffn_hidden_size=3584, num_layers=8, num_experts=8, micro_batch_size=4, seq_length=2048, bf16=True
)
QUICK = argparse.Namespace(
    hidden_size=128, ffn_hidden_size=256, num_layers=1, num_experts=4, micro_batch_size=2, seq_length=128, bf16=True
)
SECONDS = 20.0
# GPUs with less than the peak of their name: a slice of the GPU, other clocks, fewer units.
_OTHER_CARDS = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti)\b")
_NO_PEAK = "left out: this device's peak is not in the table"


def compare(context: Context, findings: Findings) -> None:
    """The step `speed`: "ours" runs with SMAR, "theirs" has neither modality biases nor statistics."""
    ours, theirs, parameters = build(context)
    options = QUICK if context.quick or context.device == "cpu" else SIZES
    for step in (ours, theirs, ours, theirs):  # warm up: compile kernels, create the optimizers' states
        step()
    pairs = _pairs(ours, theirs, 2 if context.quick else 30)
    tokens = options.micro_batch_size * options.seq_length
    flops, peak = model_flops(options), _peak(context)
    findings.note("parameters M", round(parameters / 1e6, 1))
    findings.note("pairs", len(pairs))
    findings.note("TFLOP of a step", round(flops / 1e12, 3))
    for name, times in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        seconds = statistics.median(times)
        findings.note(f"{name} tokens/s", round(tokens / seconds))
        findings.note(f"{name} MFU %", round(100 * flops / seconds / peak, 2) if peak else _NO_PEAK)
    ratios = [their / our for our, their in pairs]
    findings.note("ours / theirs", round(statistics.median(ratios), 3))
    findings.note("times", pairs)


def build(context: Context) -> tuple[Callable[[], float], Callable[[], float], int]:
    """Returns "ours", "theirs" and the number of parameters; both models are on the device and use the same batch."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    from megatron_smar import runtime

    runtime.install()
    import importlib.util

    from benchmarks import vs_transformers

    options = QUICK if context.quick or context.device == "cpu" else SIZES
    hf, batch = vs_transformers.hugging_face_model(options), vs_transformers.make_batch(options)
    hf.model.vision_tower.save_pretrained(context.folder / "vision")
    flags = [*vs_transformers.our_flags(options, str(context.folder / "vision")), "--use-distributed-optimizer"]
    if context.device == "cuda" and importlib.util.find_spec("transformer_engine"):
        flags.append("--moe-grouped-gemm")
    ours = vs_transformers.our_step(flags, batch)
    on_device = {name: tensor.to(context.device) for name, tensor in batch.items()}
    theirs = vs_transformers.their_step(hf.to(context.device), on_device)
    return ours, theirs, sum(p.numel() for p in hf.parameters())


def _pairs(ours: Callable[[], float], theirs: Callable[[], float], number: int) -> list[tuple[float, float]]:
    """Times both steps in turns, for at most `SECONDS` in total; a step ends by reading its loss on the host."""
    import torch

    def seconds(step: Callable[[], float]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    rows, end = [], time.monotonic() + SECONDS
    for pair in range(number):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        times = {step: seconds(step) for step in order}
        rows.append((times[ours], times[theirs]))
        if time.monotonic() > end:
            break
    return rows


def model_flops(options: argparse.Namespace) -> float:
    """Returns the operations of one step by the model's definition: forward, and twice as many for trained backward.

    Counts matrix products, with a multiplication and an addition each, and the lower half of causal attention.
    Recomputation is not counted. The vision tower is frozen: only its forward pass is counted.
    """
    from benchmarks.vs_transformers import IMAGE_SIZE, PATCH, TOKENS_PER_TILE, VOCABULARY

    hidden, length, rows = options.hidden_size, options.seq_length, options.micro_batch_size
    tokens = rows * length
    attention = (
        2 * tokens * hidden * (hidden + 2 * hidden // 2 + hidden)
    )  # queries; 4 of 8 heads of keys, values; output
    scores = 2 * 2 * rows * length**2 * hidden / 2
    experts = (
        2 * tokens * (2 * 3 * hidden * options.ffn_hidden_size + options.num_experts * hidden)
    )  # top 2, and router
    trained = options.num_layers * (attention + scores + experts) + 2 * tokens * hidden * VOCABULARY
    trained += 2 * rows * TOKENS_PER_TILE * (4 * 128 * hidden + hidden * hidden)  # the connector's two products
    patches, width, inner = (IMAGE_SIZE // PATCH) ** 2 + 1, 128, 512
    layer = 2 * patches * (4 * width * width + 2 * width * inner) + 4 * patches**2 * width
    vision = rows * (4 * layer + 2 * patches * 3 * PATCH**2 * width)
    return 3 * trained + vision


def _peak(context: Context) -> float | None:
    """Returns the GPU's peak bf16 FLOP/s, or None if it is unknown."""
    import torch

    return peak_of(torch.cuda.get_device_name()) if context.device == "cuda" else None


def peak_of(name: str) -> float | None:
    """Returns the peak of a GPU by torch's name of it, matching full words: an RTX A1000 is not an A100."""
    if _OTHER_CARDS.search(name):
        return None
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
