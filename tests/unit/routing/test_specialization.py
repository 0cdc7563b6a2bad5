# SPDX-License-Identifier: Apache-2.0
"""The Modality Specialization Index compared with its definition, expert by expert, and its properties."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_smar.routing import dropped_share, expert_load, load_entropy, modality_specialization_index


@st.composite
def token_counts(draw, modalities=None):
    """Generates counts [M][E], in which experts and entire modalities may have no tokens."""
    experts = draw(st.integers(1, 6))
    row = st.lists(st.sampled_from([0, 0, 1, 2, 7, 1000]), min_size=experts, max_size=experts)
    number = modalities or draw(st.integers(1, 4))
    return draw(st.lists(row, min_size=number, max_size=number))


def index_of(counts) -> float:
    return float(modality_specialization_index(expert_load(torch.tensor(counts, dtype=torch.float64))))


def definition(counts) -> float:
    """Compares every expert's mix of modalities with the uniform mix, weighted by the load that the expert receives."""
    loads = [[count / sum(row) for count in row] for row in counts if sum(row)]
    number = len(loads)
    if number < 2:
        return 0.0
    index = 0.0
    for column in zip(*loads, strict=True):
        received = sum(column)
        if received:
            variation = sum(abs(load / received - 1 / number) for load in column)
            index += received / number * variation / (2 * (1 - 1 / number))
    return index


@settings(max_examples=300, deadline=None)
@given(token_counts())
def test_index_equals_its_definition_and_is_between_0_and_1(counts):
    index = index_of(counts)
    assert index == pytest.approx(definition(counts), abs=1e-12)
    assert -1e-12 <= index <= 1 + 1e-12


@settings(max_examples=100, deadline=None)
@given(token_counts(), st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_index_does_not_depend_on_how_many_tokens_a_modality_has(counts, factors):
    scaled = [[factor * count for count in row] for factor, row in zip(factors, counts, strict=False)]
    assert index_of(scaled) == pytest.approx(index_of(counts), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(token_counts(modalities=1), st.integers(2, 4))
def test_modalities_with_the_same_load_are_not_specialized(counts, modalities):
    assert index_of(counts * modalities) == pytest.approx(0, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(token_counts())
def test_modalities_that_share_no_expert_are_fully_specialized(counts):
    assume(len(counts) >= 2 and all(sum(row) for row in counts))
    number, experts = len(counts), len(counts[0])
    apart = [[0] * experts * m + row + [0] * experts * (number - 1 - m) for m, row in enumerate(counts)]
    assert index_of(apart) == pytest.approx(1, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(token_counts(modalities=2))
def test_index_of_two_modalities_is_the_total_variation_between_their_loads(counts):
    assume(all(sum(row) for row in counts))
    text, vision = ([count / sum(row) for count in row] for row in counts)
    expected = sum(abs(a - b) for a, b in zip(text, vision, strict=True)) / 2
    assert index_of(counts) == pytest.approx(expected, abs=1e-12)


def test_absent_modalities_do_not_change_the_index_of_the_others():
    assert index_of([[3, 1], [0, 0], [1, 3]]) == pytest.approx(index_of([[3, 1], [1, 3]])) == pytest.approx(0.5)
    assert index_of([[3, 1], [0, 0]]) == 0


def test_all_layers_are_measured_in_one_call():
    counts = torch.tensor([[[4.0, 0.0], [0.0, 2.0]], [[2.0, 2.0], [5.0, 5.0]], [[2.0, 2.0], [0.0, 0.0]]])
    load = expert_load(counts)
    assert modality_specialization_index(load).tolist() == [1, 0, 0]
    expected = torch.tensor([[0, 0], [math.log(2), math.log(2)], [math.log(2), 0]])
    torch.testing.assert_close(load_entropy(load), expected)


def test_dropped_tokens_are_those_that_no_expert_executed():
    counts = torch.tensor([[4.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
    shares = dropped_share(counts, torch.tensor([4.0, 2.0, 0.0]), top_k=2)
    assert shares.tolist() == [0, 0.25, 0]
    assert expert_load(counts)[1].tolist() == pytest.approx([1 / 3, 2 / 3]), "loads are shares of what was executed"
