# SPDX-License-Identifier: Apache-2.0
"""Plans: the order by the share of text, orders that undo and follow each other, and the file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.placement.plan import Plan, check_devices, composed, inverse, read_plan, sorted_by_share, text_share

orders = st.integers(1, 12).flatmap(lambda number: st.permutations(range(number)))


@given(orders)
def test_an_order_followed_by_its_inverse_leaves_every_expert_where_it_was(order):
    unmoved = tuple(range(len(order)))
    assert composed(order, inverse(order)) == composed(inverse(order), order) == unmoved


@given(st.data(), orders)
def test_a_composed_order_equals_moving_the_experts_twice(data, first):
    then = data.draw(st.permutations(range(len(first))))
    once = [f"expert {number}" for number in first]
    assert [f"expert {number}" for number in composed(first, then)] == [once[place] for place in then]


@given(
    st.integers(2, 4).flatmap(
        lambda m: st.lists(st.lists(st.integers(0, 9), min_size=m, max_size=m), min_size=1, max_size=16)
    )
)
def test_experts_are_sorted_by_share_of_text_then_by_number_with_half_where_nothing_was_routed(columns):
    loads = torch.tensor(columns).t()
    shares = [column[0] / sum(column) if sum(column) else 0.5 for column in columns]
    assert text_share(loads).tolist() == shares
    assert sorted_by_share(text_share(loads)) == tuple(sorted(range(len(shares)), key=lambda e: (shares[e], e)))


def test_the_bins_of_a_plan_are_runs_of_the_sorted_experts_and_each_layer_has_its_own():
    loads = {2: torch.tensor([[9, 0, 5, 0], [1, 4, 5, 0]]), 1: torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])}
    plan = Plan.of_loads(loads, 2, "test", {})
    assert plan.orders == {1: (0, 1, 2, 3), 2: (1, 2, 3, 0)}
    assert plan.shares[2] == (0.9, 0.0, 0.5, 0.5)
    lines = plan.table().splitlines()
    assert lines[3] == "layer   2  device  0  text  25.0%  1 2" and lines[4].endswith("70.0%  3 0")


def test_a_written_plan_is_read_as_it_was(tmp_path):
    plan = Plan.of_loads({1: torch.tensor([[3.0, 1.0], [1.0, 7.0]])}, 2, "test", {1: [1, 0]})
    plan.write(tmp_path / "new" / "plan.json")
    assert read_plan(tmp_path / "new" / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("layers"), "holds no plan"),
        (lambda content: content["layers"]["1"].update(order=[0, 0, 1, 2]), "does not name each expert"),
        (lambda content: content["layers"]["2"].update(order=[0, 1]), "does not name each expert"),
        (lambda content: content.update(devices=3), "devices is 3, but the model's 4 experts"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, change, said):
    file = tmp_path / "plan.json"
    Plan.of_loads({n: torch.eye(2, 4) for n in (1, 2)}, 2, "test", {}).write(file)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said) as refusal:
        read_plan(file)
    assert f"--plan {file}" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("devices", [0, 1, 3, 16])
def test_devices_that_cannot_share_the_experts_equally_are_refused_with_those_that_can(devices):
    with pytest.raises(ValueError, match=rf"--devices is {devices}, .* 8 experts .* give one of 2, 4, 8\."):
        check_devices(devices, 8)
    for fitting in (2, 4, 8):
        check_devices(fitting, 8)
