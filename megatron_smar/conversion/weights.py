# SPDX-License-Identifier: Apache-2.0
"""Weight tables, which map Hugging Face's weights to Megatron's: one per architecture, read in both directions.

A Megatron weight is one Hugging Face tensor, or is concatenated from runs of rows of one or several: for each query
group its queries, key and value, or the rows of gate_proj, then those of up_proj. A weight without a Hugging Face
counterpart is newly initialized. A table has one row per Megatron weight. An import reads the table from Hugging Face
to Megatron, an export in the other direction.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Consecutive rows (along the first axis) of one Hugging Face tensor.

    Attributes:
        source: Index of the tensor's name in `Weight.hf`.
        start: First row in that tensor.
        length: Number of rows.
    """

    source: int
    start: int
    length: int


@dataclass(frozen=True)
class Weight:
    """One row of a weight table: a Megatron weight and the Hugging Face tensors that it consists of.

    Attributes:
        megatron: Name in the state dict of the unsharded model, with layers and experts counted from 0.
        hf: Names of the Hugging Face tensors on disk.
        runs: Runs of rows of the tensors in `hf` that make up the weight, in order; empty if the weight is the only
            tensor in `hf`, or has none.
        make: Returns a new weight of a given shape and data type, for a weight that is not read (a new connector or
            router).
        rows: Number of rows of the Hugging Face tensor if Megatron's weight has more (a padded or grown vocabulary).
        change: Maps the rows that were read, and the index of the first of them in the weight, to the rows to write
            (upcycling's noise).
        dtype: Fixed data type of the weight, whatever --dtype asks for; None if it follows --dtype.
        keeps_float32: Whether the weight stays in float32 in a conversion to half precision, as in transformers' model.
    """

    megatron: str
    hf: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    make: Callable[[torch.Size, torch.dtype], Tensor] | None = None
    rows: int | None = None
    change: Callable[[Tensor, int], Tensor] | None = None
    dtype: torch.dtype | None = None
    keeps_float32: bool = False

    def converted(self, wanted: torch.dtype | None, stored: torch.dtype) -> torch.dtype:
        """Returns the data type in which the weight is written.

        Args:
            wanted: Data type that --dtype asks for; None keeps the stored one.
            stored: Data type of the stored tensor.
        """
        if self.dtype is not None:
            return self.dtype
        if wanted is None or not stored.is_floating_point:
            return stored
        return torch.float32 if self.keeps_float32 else wanted

    def prefixed(self, megatron: str, hf: str) -> Weight:
        """Returns the row with prefixes to both names, for a model that contains this one as a part."""
        return replace(self, megatron=megatron + self.megatron, hf=tuple(hf + name for name in self.hf))


def per_layer(
    layers: Iterable[int], megatron: str, *hf: str, runs: Sequence[Run] = (), experts: int | None = None
) -> list[Weight]:
    """Returns the table rows of one kind of weight, for several layers and each of their experts.

    Args:
        layers: Numbers of the layers, from 0.
        megatron: Megatron's name, with the placeholders {layer} and, if there are experts, {expert}.
        *hf: Hugging Face's names, with the same placeholders.
        runs: Runs of rows, as in `Weight`.
        experts: Number of experts; None for a weight that each layer has once.
    """
    return [
        Weight(
            megatron.format(layer=layer, expert=expert),
            tuple(name.format(layer=layer, expert=expert) for name in hf),
            tuple(runs),
        )
        for layer in layers
        for expert in range(1 if experts is None else experts)
    ]


def query_key_value(heads: int, groups: int, head_dim: int) -> tuple[Run, ...]:
    """Returns the runs of q_proj, k_proj and v_proj in Megatron's `linear_qkv`: for each query group q, k and v."""
    queries = heads // groups * head_dim
    return tuple(
        run
        for group in range(groups)
        for run in (
            Run(0, group * queries, queries),
            Run(1, group * head_dim, head_dim),
            Run(2, group * head_dim, head_dim),
        )
    )


def fused_query_key_value(heads: int, groups: int, head_dim: int) -> tuple[Run, ...]:
    """Returns the runs of `linear_qkv` from one tensor of all queries, then all keys, then all values (Phi-3)."""
    starts = (0, heads * head_dim, (heads + groups) * head_dim)
    runs = query_key_value(heads, groups, head_dim)
    return tuple(Run(0, starts[run.source] + run.start, run.length) for run in runs)


def stacked(*lengths: int) -> tuple[Run, ...]:
    """Returns the runs of tensors concatenated along the rows, given each tensor's rows (`linear_fc1`: gate, up)."""
    return tuple(Run(source, 0, length) for source, length in enumerate(lengths))


def rows_of(start: int, length: int) -> tuple[Run, ...]:
    """Returns the run of consecutive rows of a single tensor."""
    return (Run(0, start, length),)


def generator_of(name: str, seed: int) -> torch.Generator:
    """Returns a weight's random generator; it depends on name and seed only, not on what else is converted."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor, and the place in another tensor to which they are copied.

    Attributes:
        name: Name of the tensor that is read.
        start: First row in the tensor that is read; None if it is the only source of the tensor that is written.
        length: Number of rows; 0 for all rows, if `start` is None.
        target: First row in the tensor that is written.
    """

    name: str
    start: int | None
    length: int
    target: int


def pieces_of(weight: Weight, start: int, length: int) -> list[Piece]:
    """Returns the pieces from which rows `start` to `start + length` of a Megatron weight are read (for an import)."""
    if not weight.runs:
        return [Piece(weight.hf[0], start, length, 0)]
    pieces, first = [], 0
    for run in weight.runs:
        begin, end = max(first, start), min(first + run.length, start + length)
        if begin < end:
            pieces.append(Piece(weight.hf[run.source], run.start + begin - first, end - begin, begin - start))
        first += run.length
    return pieces


def inverted(table: Iterable[Weight]) -> dict[str, list[Piece]]:
    """Returns, for each Hugging Face tensor, the pieces of Megatron weights that it is made of (for an export)."""
    made: dict[str, list[Piece]] = {}
    for weight in table:
        if not weight.runs:
            for name in weight.hf:
                made.setdefault(name, []).append(Piece(weight.megatron, None, weight.rows or 0, 0))
            continue
        first = 0
        for run in weight.runs:
            made.setdefault(weight.hf[run.source], []).append(Piece(weight.megatron, first, run.length, run.start))
            first += run.length
    return made
