# SPDX-License-Identifier: Apache-2.0
"""The benchmarks as a user runs them; what they count, not how fast anything is."""

import json

import pytest

from tests.launch import run


def test_smar_adds_one_collective_per_layer_and_the_benchmark_reports_its_cost():
    done = run("tools/benchmark/smar_overhead.py", "--shape", "demo", "--triples", 2, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["collectives_per_layer"] == 1
    assert result["floats_per_layer"] == 2 * (2 * 8 + 1)
    assert result["global_aux_loss_collectives_per_layer"] == 1
    demo = result["shapes"]["demo"]
    assert {"step_overhead_percent", "global_aux_loss_overhead_percent", "exposed_wait_percent"} <= result.keys()
    assert demo["breakdown_sum_percent"] == pytest.approx(sum(demo["breakdown_percent"].values()))
    assert all(demo["breakdown_percent"][part] > 0 for part in ("modality_bias", "statistics", "launch"))


def test_ranks_that_cannot_share_the_experts_are_refused_in_a_sentence():
    done = run("tools/benchmark/smar_overhead.py", "--ranks", 3, check=False)
    assert done.returncode == 2 and "--ranks 3 cannot share 8 experts out; give 2, 4 or 8." in done.stdout
