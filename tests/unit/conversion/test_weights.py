# SPDX-License-Identifier: Apache-2.0
"""Weight tables are read in both directions: each direction inverts the other."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_smar.conversion.weights import (
    Run,
    Weight,
    fused_query_key_value,
    inverted,
    per_layer,
    pieces_of,
    query_key_value,
    stacked,
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Weight], dict[str, Tensor]]:
    """Draws tensors split into random runs, and weights that consist of all these runs in any order."""
    hf, runs = {}, []
    for source in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        runs += [Run(source, start, length) for start, length in zip(starts, lengths, strict=True)]
        hf[f"hf.{source}"] = torch.arange(sum(lengths) * 2).view(-1, 2) + 100 * source
    runs = draw(st.permutations(runs))
    bounds = sorted(draw(st.sets(st.integers(1, len(runs)), max_size=2)) | {0, len(runs)})
    spans = [runs[a:b] for a, b in itertools.pairwise(bounds)]
    return [Weight(f"megatron.{n}", tuple(hf), tuple(span)) for n, span in enumerate(spans)], hf


def made(row: Weight, hf: dict[str, Tensor]) -> Tensor:
    """Assembles a weight from its runs."""
    return torch.cat([hf[row.hf[run.source]][run.start : run.start + run.length] for run in row.runs])


@given(tables())
def test_an_export_by_a_table_inverts_the_import(table):
    rows, hf = table
    megatron = {row.megatron: made(row, hf) for row in rows}
    for name, pieces in inverted(rows).items():
        back = torch.full_like(hf[name], -1)
        for piece in pieces:
            back[piece.target : piece.target + piece.length] = megatron[piece.name][piece.start :][: piece.length]
        assert torch.equal(back, hf[name])


@given(tables(), st.data())
def test_a_part_of_a_weight_equals_those_rows_of_the_full_weight(table, data):
    rows, hf = table
    row = data.draw(st.sampled_from(rows))
    weight = made(row, hf)
    start = data.draw(st.integers(0, len(weight) - 1))
    length = data.draw(st.integers(1, len(weight) - start))
    part = torch.full((length, 2), -1)
    for piece in pieces_of(row, start, length):
        part[piece.target : piece.target + piece.length] = hf[piece.name][piece.start :][: piece.length]
    assert torch.equal(part, weight[start : start + length])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_attention_heads_are_ordered_as_megatron_splits_them(groups, per_group, head_dim):
    heads = groups * per_group
    sizes = {"q": heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    hf = {name: torch.arange(size).view(-1, 1) + 1000 * n for n, (name, size) in enumerate(sizes.items())}
    # Megatron's view of linear_qkv's output: [groups, per_group + 2, head_dim]
    split = [tensor.view(groups, -1, head_dim) for tensor in hf.values()]
    expected = torch.cat(split, dim=1).view(-1, 1)
    separate = Weight("qkv", tuple(hf), query_key_value(heads, groups, head_dim))
    assert torch.equal(made(separate, hf), expected)
    fused = Weight("qkv", ("all",), fused_query_key_value(heads, groups, head_dim))
    assert torch.equal(made(fused, {"all": torch.cat(list(hf.values()))}), expected)


def test_a_weight_without_runs_is_one_unchanged_tensor():
    row = Weight("norm", ("hf_norm",)).prefixed("language.", "model.")
    (piece,) = pieces_of(row, 3, 4)
    assert (piece.name, piece.start, piece.length, piece.target) == ("model.hf_norm", 3, 4, 0)
    assert inverted([row])["model.hf_norm"][0].name == "language.norm"


def test_table_rows_are_made_for_each_layer_and_expert():
    rows = per_layer(
        [0, 2], "l{layer}.e{expert}", "{layer}/{expert}/a", "{layer}/{expert}/b", runs=stacked(2, 3), experts=2
    )
    assert [row.megatron for row in rows] == ["l0.e0", "l0.e1", "l2.e0", "l2.e1"]
    assert rows[3].hf == ("2/1/a", "2/1/b")
    assert rows[3].runs == (Run(0, 0, 2), Run(1, 0, 3))
    assert [row.megatron for row in per_layer([1], "l{layer}", "x{layer}")] == ["l1"]
