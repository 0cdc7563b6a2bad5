# SPDX-License-Identifier: Apache-2.0
"""Estimates memory and disk of the recipes' parallel layouts by counting; nothing here has been measured on a GPU.

    python examples/memory.py

Weights take 2 bytes (bf16), Megatron's gradients 4 (fp32), AdamW's main weights and moments 12 (fp32). Experts are
sharded over the expert-parallel ranks and replicated on the others; everything else is replicated on all ranks. The
distributed optimizer shards its 12 bytes per parameter over the replicas. In the host's memory (--optimizer-cpu-
offload) they are 16 bytes, with a copy of the gradients. A checkpoint has the weights and, of those that are trained,
the optimizer's 12 bytes; while it is saved or loaded each rank holds that part of its own experts and other weights in
the host's memory ("saving"). Layers are recomputed. A rank is assumed to receive twice the tokens of an even share,
since SMAR's specialized experts may unbalance the load that much.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from architectures import ARCHITECTURES, Architecture
from transformers import AutoModel, AutoModelForCausalLM

WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12
OFFLOADED = OPTIMIZER + GRADIENT  # Megatron keeps a pinned copy of the gradients next to the state
IMBALANCE = 2


@dataclass(frozen=True)
class Layout:
    """Parallel layout and batch of a recipe's stage.

    Attributes:
        gpus: Number of GPUs.
        experts: Value of --expert-model-parallel-size.
        offload: Whether the optimizer's state is in the host's memory (--optimizer-cpu-offload).
        sequence: Value of --seq-length.
        micro_batch: Value of --micro-batch-size.
    """

    gpus: int
    experts: int
    offload: bool
    sequence: int = 4096
    micro_batch: int = 1


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        experts: Parameters of all experts.
        rest: Parameters of the rest of the language model.
        vision: Parameters of the vision tower.
        trained_rest: Number of the parameters in `rest` that are trained.
    """

    experts: int
    rest: int
    vision: int
    trained_rest: int


def count(architecture: Architecture) -> Parameters:
    """Counts a recipe's parameters on the meta device; the connector's 21 million are left out."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(architecture.language)
        vision = AutoModel.from_config(architecture.vision)
    sizes = {name: parameter.numel() for name, parameter in language.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts
    trained = rest
    if architecture.upcycled:
        number, _, every = architecture.upcycled
        layers = range(0, architecture.language.num_hidden_layers, every)
        replaced = sum(size for name, size in sizes.items() if _layer(name) in layers and ".mlp." in name)
        experts, rest, trained = number * replaced, rest - replaced, 0
    return Parameters(experts, rest, sum(p.numel() for p in vision.parameters()), trained)


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def activations(architecture: Architecture, layout: Layout) -> float:
    """Returns the bytes of all layers' inputs plus the temporary memory of one layer and of the logits."""
    config, tokens = architecture.language, layout.sequence * layout.micro_batch
    hidden, layers = config.hidden_size, config.num_hidden_layers
    top_k = architecture.upcycled[1] if architecture.upcycled else config.num_experts_per_tok
    ffn = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    gated = 1 if architecture.upcycled else 2  # Phi's feed-forward layer has no gate
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    attention = tokens * (4 * hidden + 4 * heads) * WEIGHT  # norms, residuals, queries, keys, values, output
    experts = tokens * top_k * IMBALANCE * (2 * hidden + (gated + 1) * ffn) * WEIGHT
    logits = tokens * config.vocab_size * (2 + 4 + 4)  # in bf16, in fp32, and their gradient
    return layers * tokens * hidden * WEIGHT + attention + experts + logits


def estimate(architecture: Architecture, layout: Layout) -> dict[str, float]:
    """Returns the bytes on one GPU by kind, those of the host's memory per GPU, and those of a checkpoint on disk."""
    parameters = count(architecture)
    experts = parameters.experts / layout.experts
    own = (parameters.experts + parameters.trained_rest) / layout.gpus
    return {
        "weights": WEIGHT * (experts + parameters.rest + parameters.vision),
        "gradients": GRADIENT * (experts + parameters.trained_rest),
        "optimizer": 0.0 if layout.offload else OPTIMIZER * own,
        "activations": activations(architecture, layout),
        "host": OFFLOADED * own if layout.offload else 0.0,
        "saving": OPTIMIZER * (experts + parameters.trained_rest),
        "checkpoint": WEIGHT * (parameters.experts + parameters.rest + parameters.vision)
        + OPTIMIZER * (parameters.experts + parameters.trained_rest),
    }


# Layouts of the last stage of each recipe, as in its script.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mixtral_8x7b_internvit": (Layout(8, 8, True), Layout(64, 8, False)),
    "qwen3_30b_a3b_internvl": (Layout(8, 8, True), Layout(64, 8, False)),
    "moe_llava_phi": (
        Layout(8, 1, False, 2048, micro_batch=4),
        Layout(64, 1, False, 2048, micro_batch=2),
    ),
}


def main() -> None:
    """Prints the table, in GB of 10^9 bytes."""
    names, on_the_host = ("weights", "gradients", "optimizer", "activations"), ("host/GPU", "saving/GPU", "checkpoint")
    print(f"{'recipe':24}{'GPUs':>5}{'EP':>4}", *(f"{name:>12}" for name in (*names, "of a GPU", *on_the_host)))
    for recipe, layouts in LAYOUTS.items():
        for layout in layouts:
            parts = estimate(ARCHITECTURES[recipe], layout)
            values = [*(parts[name] for name in names), sum(parts[name] for name in names)]
            values += [parts["host"], parts["saving"], parts["checkpoint"]]
            place = f"{recipe:24}{layout.gpus:>5}{layout.experts:>4}"
            print(place, *(f"{value / 1e9:>12.1f}" for value in values))


if __name__ == "__main__":
    main()
