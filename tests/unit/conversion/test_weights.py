# SPDX-License-Identifier: Apache-2.0
"""Tables of weights: whatever they say is read in both directions."""

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
    """Tensors cut into runs at random, and weights that are made of all these runs in any order."""
    theirs, runs = {}, []
    for source in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        runs += [Run(source, start, length) for start, length in zip(starts, lengths, strict=True)]
        theirs[f"hf.{source}"] = torch.arange(sum(lengths) * 2).view(-1, 2) + 100 * source
    runs = draw(st.permutations(runs))
    cuts = sorted(draw(st.sets(st.integers(1, len(runs)), max_size=2)) | {0, len(runs)})
    spans = [runs[a:b] for a, b in itertools.pairwise(cuts)]
    return [Weight(f"ours.{n}", tuple(theirs), tuple(span)) for n, span in enumerate(spans)], theirs


def made(row: Weight, theirs: dict[str, Tensor]) -> Tensor:
    """A weight as its runs describe it."""
    return torch.cat([theirs[row.hf[run.source]][run.start : run.start + run.length] for run in row.runs])


@given(tables())
def test_what_a_table_makes_of_tensors_it_turns_back_into_them(table):
    rows, theirs = table
    ours = {row.megatron: made(row, theirs) for row in rows}
    for name, pieces in inverted(rows).items():
        back = torch.full_like(theirs[name], -1)
        for piece in pieces:
            back[piece.target : piece.target + piece.length] = ours[piece.name][piece.start :][: piece.length]
        assert torch.equal(back, theirs[name])


@given(tables(), st.data())
def test_any_rows_of_a_weight_are_those_of_the_whole_weight(table, data):
    rows, theirs = table
    row = data.draw(st.sampled_from(rows))
    whole = made(row, theirs)
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(1, len(whole) - start))
    part = torch.full((length, 2), -1)
    for piece in pieces_of(row, start, length):
        part[piece.target : piece.target + piece.length] = theirs[piece.name][piece.start :][: piece.length]
    assert torch.equal(part, whole[start : start + length])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_attention_heads_are_ordered_as_megatron_splits_them(groups, per_group, head_dim):
    heads = groups * per_group
    sizes = {"q": heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    theirs = {name: torch.arange(size).view(-1, 1) + 1000 * n for n, (name, size) in enumerate(sizes.items())}
    # Megatron's view of linear_qkv's output: [groups, per_group + 2, head_dim]
    split = [tensor.view(groups, -1, head_dim) for tensor in theirs.values()]
    expected = torch.cat(split, dim=1).view(-1, 1)
    separate = Weight("qkv", tuple(theirs), query_key_value(heads, groups, head_dim))
    assert torch.equal(made(separate, theirs), expected)
    fused = Weight("qkv", ("all",), fused_query_key_value(heads, groups, head_dim))
    assert torch.equal(made(fused, {"all": torch.cat(list(theirs.values()))}), expected)


def test_a_weight_without_runs_is_one_tensor_as_it_is():
    row = Weight("norm", ("theirs",)).prefixed("language.", "model.")
    (piece,) = pieces_of(row, 3, 4)
    assert (piece.name, piece.start, piece.length, piece.target) == ("model.theirs", 3, 4, 0)
    assert inverted([row])["model.theirs"][0].name == "language.norm"


def test_rows_of_layers_are_counted_by_layer_and_expert():
    rows = per_layer(
        [0, 2], "l{layer}.e{expert}", "{layer}/{expert}/a", "{layer}/{expert}/b", runs=stacked(2, 3), experts=2
    )
    assert [row.megatron for row in rows] == ["l0.e0", "l0.e1", "l2.e0", "l2.e1"]
    assert rows[3].hf == ("2/1/a", "2/1/b")
    assert rows[3].runs == (Run(0, 0, 2), Run(1, 0, 3))
    assert [row.megatron for row in per_layer([1], "l{layer}", "x{layer}")] == ["l1"]
