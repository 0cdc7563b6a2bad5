# SPDX-License-Identifier: Apache-2.0
"""How Hugging Face's weights lie in Megatron's: one table per architecture, read in both directions.

A Megatron weight is either one of Hugging Face's, or made of runs of rows of several: each query group's queries, key
and value one after another, gate above up. A table says so row by row; which way it is read makes an import or export.
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
        source: Its place in `Weight.hf`.
        start: First row there.
        length: Number of rows.
    """

    source: int
    start: int
    length: int


@dataclass(frozen=True)
class Weight:
    """One row of a table: a Megatron weight and what it consists of.

    Attributes:
        megatron: Name in the state dict of the whole model (one rank), layers and experts counted from 0.
        hf: Names as Hugging Face writes them to disk.
        runs: The rows of `hf` that make the weight, in order; empty: the one tensor of `hf`, as it is.
        make: Instead of `hf`: a new weight of this shape (a fresh connector, a router that upcycling adds).
        rows: Rows that Hugging Face's tensor has where Megatron's has more: a vocabulary that was padded or has grown.
        change: Applied to the rows that were read, which begin at the given one (upcycling's noise).
        dtype: The data type that the weight has whatever the rest is converted to; None for the rest's.
        keeps_float32: Whether a conversion to half precision leaves it in float32, as transformers' own model does.
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
        """The data type that the weight is written in.

        Args:
            wanted: What --dtype asks for; None for what there is.
            stored: What there is.
        """
        if self.dtype is not None:
            return self.dtype
        if wanted is None or not stored.is_floating_point:
            return stored
        return torch.float32 if self.keeps_float32 else wanted

    def prefixed(self, megatron: str, hf: str) -> Weight:
        """The same row in a model that holds this one as a part."""
        return replace(self, megatron=megatron + self.megatron, hf=tuple(hf + name for name in self.hf))


def per_layer(
    layers: Iterable[int], megatron: str, *hf: str, runs: Sequence[Run] = (), experts: int | None = None
) -> list[Weight]:
    """Rows of the same form for several layers, and for each of their experts.

    Args:
        layers: Numbers of the layers, from 0.
        megatron: Name with {layer}, and {expert} where there are experts.
        *hf: Names with the same places.
        runs: As in `Weight`.
        experts: Number of experts; None for a weight that a layer has once.
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
    """Megatron's `linear_qkv` of q_proj, k_proj and v_proj: per query group its queries, its key, its value."""
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
    """The same of one tensor that holds all queries, then all keys, then all values (Phi-3)."""
    starts = (0, heads * head_dim, (heads + groups) * head_dim)
    runs = query_key_value(heads, groups, head_dim)
    return tuple(Run(0, starts[run.source] + run.start, run.length) for run in runs)


def stacked(*lengths: int) -> tuple[Run, ...]:
    """Tensors of these many rows, one below the other: gate above up in `linear_fc1`."""
    return tuple(Run(source, 0, length) for source, length in enumerate(lengths))


def rows_of(start: int, length: int) -> tuple[Run, ...]:
    """A part of one tensor."""
    return (Run(0, start, length),)


def generator_of(name: str, seed: int) -> torch.Generator:
    """The random numbers of a new weight: the same for the same seed, whatever else is converted, in any order."""
    return torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor named `name`, bound for `target` rows further down of another.

    Attributes:
        name: The tensor that is read.
        start: First row there; None: the tensor whole, whatever its shape.
        length: Number of rows.
        target: First row in the tensor that is made.
    """

    name: str
    start: int | None
    length: int
    target: int


def pieces_of(weight: Weight, start: int, length: int) -> list[Piece]:
    """What rows `start` to `start + length` of a Megatron weight are read from (an import)."""
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
    """For every Hugging Face tensor the Megatron weights that it is made of (an export)."""
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
