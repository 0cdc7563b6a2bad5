# SPDX-License-Identifier: Apache-2.0
"""How SMAR's communication grows with ranks, experts, layers and tokens: the tables of docs/scaling.md.

The communication of the routing statistics is compared with what it overlaps with: the token all-to-all and the
experts' computation. Nothing here is measured. `benchmarks/smar_overhead.py` counts collectives and floats per layer in
a real step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

STATISTICS_BYTES = 4  # float32, whatever the model's dtype
ACTIVATION_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Model:
    """Sizes of an MoE language model that the volumes depend on.

    Attributes:
        name: Label of the model's rows.
        layers: Number of MoE layers.
        hidden: Hidden size, h.
        ffn: Intermediate size of one expert, whose three matrices are [h, ffn].
        experts: Number of experts, E.
        top_k: Experts chosen per token, K.
        modalities: Number of modalities, M.
    """

    name: str
    layers: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    modalities: int = 2


MIXTRAL = Model("Mixtral 8x7B", layers=32, hidden=4096, ffn=14336, experts=8, top_k=2)
QWEN3 = Model("Qwen3-30B-A3B", layers=48, hidden=2048, ffn=768, experts=128, top_k=8)


@dataclass(frozen=True)
class Setup:
    """The tables' assumptions other than the model's sizes.

    Attributes:
        tokens: Tokens per rank and micro-batch.
        expert_parallel: Number of ranks over which one layer's experts are sharded.
        micro_batches: Micro-batches per step.
        tflops: Assumed, not measured, speed of one rank in the experts, which gives the time available for overlap.
        models: Models of the rows.
        ranks: Numbers of ranks in the reduction.
        token_counts: Tokens per rank in the second table.
    """

    tokens: int = 4096
    expert_parallel: int = 8
    micro_batches: int = 1
    tflops: float = 400.0
    models: tuple[Model, ...] = (MIXTRAL, QWEN3)
    ranks: tuple[int, ...] = (8, 64, 256, 1024)
    token_counts: tuple[int, ...] = field(default=(512, 4096, 32768))

    def __post_init__(self) -> None:
        for name in ("tokens", "expert_parallel", "micro_batches", "tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be greater than 0.")
        for model in self.models:
            if model.experts % self.expert_parallel:
                raise ValueError(
                    f"--expert-parallel {self.expert_parallel} does not divide the {model.experts} experts of "
                    f"{model.name}; give a divisor."
                )


def reduced_floats(modalities: int, experts: int) -> int:
    """Returns M (2E + 1): counts and weights per modality and expert, and tokens per modality.

    The number does not depend on the number of tokens or ranks.
    """
    return modalities * (2 * experts + 1)


def floats_per_layer(model: Model) -> int:
    """Returns the floats that a layer of a model reduces."""
    return reduced_floats(model.modalities, model.experts)


def ring_share(ranks: int) -> float:
    """Returns 2 (n - 1) / n: what a rank sends in a ring all-reduce over n ranks, relative to the reduced tensor."""
    return 2 * (ranks - 1) / ranks


def statistics_bytes(model: Model, setup: Setup, ranks: int) -> float:
    """Returns the bytes that a rank sends per step for the statistics, in forward; backward needs no communication."""
    return floats_per_layer(model) * STATISTICS_BYTES * ring_share(ranks) * model.layers * setup.micro_batches


def all_to_all_bytes(model: Model, setup: Setup) -> float:
    """Returns the bytes that a rank sends per step for the tokens.

    Dispatch and combine, in forward and backward, send K copies of each token's h numbers four times; a share of
    (ep - 1) / ep of them leaves the rank if experts are chosen evenly.
    """
    leaving = (setup.expert_parallel - 1) / setup.expert_parallel
    copies = setup.tokens * model.top_k * leaving
    return 4 * copies * model.hidden * ACTIVATION_BYTES * model.layers * setup.micro_batches


def share(model: Model, setup: Setup, ranks: int) -> float:
    """Returns the ratio of the statistics' bytes to the all-to-all's; layers and micro-batches cancel out."""
    return statistics_bytes(model, setup, ranks) / all_to_all_bytes(model, setup)


def ring_steps(ranks: int) -> int:
    """Returns the number of sequential messages in a ring all-reduce: n - 1 each for reduce-scatter and all-gather."""
    return 2 * (ranks - 1)


def tree_steps(ranks: int) -> int:
    """Returns the number of sequential messages in a tree all-reduce: up and down the tree."""
    return 2 * math.ceil(math.log2(ranks))


def expert_seconds(model: Model, setup: Setup) -> float:
    """Returns the forward time of one layer's experts on one rank: 2 operations per weight and token."""
    return setup.tokens * model.top_k * 2 * 3 * model.hidden * model.ffn / (setup.tflops * 1e12)


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table; all columns but the first are numbers."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|---|" + "--:|" * (columns - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def size(number: float) -> str:
    """Formats bytes in a decimal unit with few digits."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def duration(seconds: float) -> str:
    """Formats seconds as milliseconds or microseconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def per_million(fraction: float) -> str:
    """Formats a small share in parts per million with two digits; 10,000 ppm are one percent."""
    return f"{1e6 * fraction:.2g} ppm"


def volume_table(setup: Setup) -> str:
    """Returns the table of volume per rank and step, by model and number of ranks."""
    header = "model | ranks | floats per layer | statistics sent per rank | tokens sent per rank | share"
    return table(
        header,
        (
            (
                model.name,
                ranks,
                floats_per_layer(model),
                size(statistics_bytes(model, setup, ranks)),
                size(all_to_all_bytes(model, setup)),
                per_million(share(model, setup, ranks)),
            )
            for model in setup.models
            for ranks in setup.ranks
        ),
    )


def tokens_table(setup: Setup) -> str:
    """Returns the table of the share by tokens per rank, on the largest number of ranks."""
    ranks = max(setup.ranks)
    header = " | ".join(["model", *(f"{tokens} tokens" for tokens in setup.token_counts)])
    settings = [Setup(tokens, setup.expert_parallel, models=setup.models) for tokens in setup.token_counts]
    return table(
        header, ((model.name, *(per_million(share(model, s, ranks)) for s in settings)) for model in setup.models)
    )


def latency_table(setup: Setup) -> str:
    """Returns the table of all-reduce steps, and how long each may take to overlap fully with the experts."""
    header = "model | ranks | experts' forward | ring steps | time per ring step | tree steps | time per tree step"
    return table(
        header,
        (
            (
                model.name,
                ranks,
                duration(expert_seconds(model, setup)),
                ring_steps(ranks),
                duration(expert_seconds(model, setup) / ring_steps(ranks)),
                tree_steps(ranks),
                duration(expert_seconds(model, setup) / tree_steps(ranks)),
            )
            for model in setup.models
            for ranks in setup.ranks
        ),
    )


def markdown(setup: Setup) -> str:
    """Returns all tables, in the form of docs/scaling.md."""
    many = max(setup.ranks)
    return "\n\n".join(
        [
            f"Per rank and step: {setup.tokens} tokens per rank and micro-batch, micro-batches per step: "
            f"{setup.micro_batches}, expert parallelism over {setup.expert_parallel} ranks, activations in bfloat16.",
            volume_table(setup),
            f"The share, on {many} ranks, by tokens per rank and micro-batch:",
            tokens_table(setup),
            f"Per layer: the all-reduce's steps, and the longest that each may take to be over when the experts of "
            f"{setup.tokens} tokens per rank are, at an assumed {setup.tflops:g} TFLOP/s:",
            latency_table(setup),
        ]
    )
