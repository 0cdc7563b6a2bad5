# SPDX-License-Identifier: Apache-2.0
"""The report's numbers and table, from traffic that can be checked by hand."""

import json

import pytest
import torch

from megatron_smar.placement.dispatch import DispatchCounter
from megatron_smar.placement.figure import write_figure
from megatron_smar.placement.report import (
    Dispatched,
    assignments,
    device_counts,
    device_of,
    headline,
    report,
    table,
    write_json,
)

BEFORE = {1: [0, 1, 2, 3], 2: [0, 1, 2, 3]}
AFTER = {1: [0, 2, 1, 3], 2: [3, 2, 1, 0]}


@pytest.fixture
def content():
    """Two rows of two text tokens and one vision token; all text chooses experts 1 and 3, all vision 0 and 2."""
    counter = DispatchCounter(assignments(BEFORE, AFTER, [2, 4]))
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[:2, :, 0], mask[2, :, 1] = True, True
    choice = torch.zeros(3, 2, 4, dtype=torch.bool)
    choice[:2, :, [1, 3]], choice[2:, :, [0, 2]] = True, True
    counter.rows = [0, 1]
    for layer in (1, 2):
        counter.count(layer, choice.flatten(0, 1), mask)
    counter.reduce([])
    return report(Dispatched(("text", "vision"), 4, 2, 100, counter.traffic))


def test_a_device_has_a_run_of_places():
    assert device_of([3, 2, 1, 0], 2) == [1, 1, 0, 0]
    assert device_of([2, 0, 3, 1], 4) == [1, 3, 0, 2]


def test_crossing_bytes_and_the_reached_cut_are_those_counted_by_hand(content):
    assert content["tokens"] == {"text": 4, "vision": 2, "padding": 0}
    two = content["devices"]["2"]
    assert two["before"]["text"]["crossing"] == two["before"]["vision"]["crossing"] == 1.0
    first, second = two["layers"]["1"]["after"], two["layers"]["2"]["after"]
    assert first["text"]["crossing"] == first["vision"]["crossing"] == 0.0, "layer 1: {0, 2} and {1, 3}"
    assert second["all"]["crossing"] == 1.0, "layer 2: {3, 2} and {1, 0}"
    assert two["after"]["all"]["crossing"] == 0.5 and two["after"]["all"]["devices_per_token"] == 1.5
    assert two["cut_reached"] == {"text": 0.5, "vision": 0.5, "all": 0.5}
    # Layer 1, before: each token has one of its two experts away. After: text is on device 1, vision on device 0.
    assert two["layers"]["1"]["before"]["text"]["bytes_all_to_all"] == 100
    assert first["text"]["bytes_all_to_all"] == 100 and first["text"]["bytes_per_device"] == 50
    assert two["floor"]["bytes_per_device"] == 50 and two["floor"]["bytes_all_to_all"] == 100
    assert two["chance"]["crossing"] == pytest.approx(4 / 6)
    assert content["devices"]["4"]["floor"]["devices_per_token"] == 2, "no device has two experts"
    assert content["devices"]["4"]["cut_reached"]["all"] is None


def test_the_headline_has_the_crossing_by_modality_and_the_cut_for_the_first_number_of_devices(content):
    content["devices"]["2"]["after"]["text"]["crossing"] = 0.25
    assert headline(content) == {
        **{"devices": 2, "bytes_cut_of_reachable": 0.5},
        **{"crossing_before": 1.0, "crossing_before_text": 1.0, "crossing_before_vision": 1.0},
        **{"crossing_after": 0.5, "crossing_after_text": 0.25, "crossing_after_vision": 0.5},
    }


def test_the_table_has_each_number_of_the_json(content, tmp_path):
    write_json(tmp_path / "report.json", content)
    assert json.loads((tmp_path / "report.json").read_text()) == content
    text = table(content)
    assert "4 text, 2 vision, 0 padding" in text
    (row,) = [line for line in text.splitlines()[: text.splitlines().index("4 devices")] if line.split()[:1] == ["all"]]
    assert row.split() == "all 100.0% -> 50.0% 2.00 -> 1.50 100 -> 100 100 -> 75 50.0%".split()
    assert max(map(len, text.splitlines())) <= 120


def test_the_figure_shows_both_states_with_chance_and_floor(content, tmp_path):
    write_figure(tmp_path / "new" / "figure.svg", content)
    drawn = (tmp_path / "new" / "figure.svg").read_text()
    assert "<svg" in drawn and len(drawn) > 5000
    write_figure(tmp_path / "figure.png", content)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_devices_that_do_not_fit_are_left_out_or_refused_if_none_fits():
    assert device_counts(8, [2, 4, 8]) == [2, 4, 8]
    assert device_counts(6, [2, 4, 8]) == [2]
    with pytest.raises(ValueError, match=r"--devices 4 8: none of these shares the model's 6 experts equally"):
        device_counts(6, [4, 8])
