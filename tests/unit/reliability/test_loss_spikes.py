# SPDX-License-Identifier: Apache-2.0
"""A loss far above those before it is found, and its samples are shown."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from megatron_smar.reliability.loss_spikes import WINDOW, LossSpikes, SpikeFinder
from megatron_smar.reliability.step_samples import WatchedSamples, describe


def finder_with(losses):
    finder = SpikeFinder(6.0)
    assert [finder.add(loss) for loss in losses] == [None] * len(losses)
    return finder


NOISE = [2.0 + 0.1 * math.sin(step) for step in range(WINDOW)]  # a standard deviation of 0.07


@pytest.mark.parametrize(("loss", "found"), [(2.40, False), (2.45, True), (0.1, False), (math.nan, False)])
def test_a_loss_is_a_spike_from_six_deviations_above_the_mean_of_the_hundred_before(loss, found):
    spike = finder_with(NOISE).add(loss)
    assert (spike is not None) == found
    if spike is not None:
        assert (spike.mean, spike.deviation) == pytest.approx((2.0, 0.0707), abs=2e-3)


def test_nothing_is_a_spike_before_a_hundred_steps_and_no_nan_enters_the_mean():
    assert SpikeFinder(6.0).add(1e9) is None
    finder = finder_with(NOISE[:-1])
    assert finder.add(math.nan) is None and finder.add(50.0) is None  # the hundredth
    assert finder_with(NOISE + [math.nan] * 50).add(3.0) is not None


def test_equal_losses_have_no_spikes_by_rounding():
    assert finder_with([2.0] * WINDOW).add(2.0 + 1e-7) is None


def test_a_spike_is_logged_with_the_samples_of_its_own_step(single_rank, tmp_path, capsys):
    spikes = LossSpikes(6.0, "lm loss", lambda step: [f"key{step}"], dist.group.WORLD, True, tmp_path)
    for step, loss in enumerate([*NOISE, 9.0, 2.0], start=1):
        spikes(step, {"lm loss": torch.tensor(loss)}, False)
    spikes(WINDOW + 3, {}, False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: iteration {WINDOW + 1}: its lm loss, 9.0000, is ")
    assert "deviation 0.07" in line and line.endswith(f"its samples: data-parallel rank 0: key{WINDOW + 1}")


def test_a_skipped_step_is_no_spike_and_none_of_the_hundred(single_rank, capsys):
    spikes = LossSpikes(6.0, "lm loss", lambda step: [], dist.group.WORLD, True, None)
    for step, loss in enumerate(NOISE, start=1):
        spikes(step, {"lm loss": torch.tensor(loss)}, False)
    spikes(WINDOW + 1, {"lm loss": torch.tensor(9.0)}, True)
    spikes(WINDOW + 2, {"lm loss": torch.tensor(2.0)}, False)
    spikes.finish()
    assert capsys.readouterr().out == ""


class Batch:
    def __init__(self, *keys):
        self.__key__ = keys


def test_the_keys_of_the_last_steps_are_known_by_step():
    step = [1]
    samples = WatchedSamples(iter([Batch("a", "b"), Batch("c"), Batch("d"), Batch("e"), Batch("f")]), lambda: step[0])
    for step[0] in (1, 1, 2, 3, 4):
        next(samples)
    assert [samples.keys_of(number) for number in (1, 2, 3, 4)] == [[], ["d"], ["e"], ["f"]]


def test_a_few_keys_are_in_the_line_and_many_in_a_file(tmp_path):
    file = tmp_path / "spikes" / "step_00000007.jsonl"
    assert describe([["a", "b"], []], file) == "data-parallel rank 0: a, b" and not file.exists()
    assert describe([[], []], file) == "not known"
    keys = [[f"{rank}/{number}" for number in range(10)] for rank in range(3)]
    said = describe(keys, file)
    assert said.startswith("data-parallel rank 0: 0/0, 0/1") and said.endswith(f"1/5, ...; all 30 in {file}")
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"rank": rank, "keys": own} for rank, own in enumerate(keys)
    ]
    assert describe(keys, None).endswith("1/5, ...")
