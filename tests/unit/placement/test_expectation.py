# SPDX-License-Identifier: Apache-2.0
"""Chance and floors, compared with every choice of experts there is."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.placement.expectation import Sizes


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    devices, local = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    return Sizes(devices * local, draw(st.integers(1, min(5, devices * local))), devices)


@given(sizes())
def test_chance_and_floor_equal_those_of_all_choices_of_experts(case):
    local = case.num_experts // case.devices
    reached = [len({e // local for e in chosen}) for chosen in combinations(range(case.num_experts), case.top_k)]
    assert case.chance_crossing == pytest.approx(sum(n > 1 for n in reached) / len(reached))
    assert case.chance_devices == pytest.approx(sum(reached) / len(reached))
    assert case.least_devices == min(reached)
    assert case.least_crossing == float(all(n > 1 for n in reached))


def test_chance_is_the_papers_figure_for_two_devices():
    assert f"{Sizes(64, 8, 2).chance_crossing:.1%}" == "99.5%"
    assert f"{Sizes(8, 2, 2).chance_crossing:.0%}" == "57%"


@given(sizes())
def test_mean_copies_that_leave_equal_those_of_every_home(case):
    """Home is independent of the experts: the mean over all homes, for one token with any experts."""
    local = case.num_experts // case.devices
    chosen = [e // local for e in range(case.top_k)]
    all_to_all = sum(device != home for home in range(case.devices) for device in chosen) / case.devices
    single = sum(device != home for home in range(case.devices) for device in set(chosen)) / case.devices
    assert all_to_all == pytest.approx(case.top_k * case.away)
    assert single == pytest.approx(len(set(chosen)) * case.away)


def test_the_reached_cut_is_a_share_of_what_the_floor_leaves():
    case = Sizes(64, 8, 2)
    assert case.cut(1.98, 1.245) == pytest.approx(0.75)
    assert case.cut(1.5, 1.0) == 1.0 and case.cut(1.5, 1.75) == -0.5
    assert case.cut(1.0, 1.0) is None
