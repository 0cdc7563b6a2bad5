# SPDX-License-Identifier: Apache-2.0
"""Tests that run the benchmarks like a user; they check what is counted, not how fast anything is."""

import json

import pytest

from tests.launch import run


@pytest.mark.matrix
def test_smar_adds_one_collective_no_more_operations_than_megatrons_balance_loss_and_20_kernels():
    command = ("--strategy", "smar", "none", "--shape", "demo", "--triples", 2, "--json")
    done = run("benchmarks/smar_overhead.py", *command)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["collectives_per_layer"] == 1
    assert result["floats_per_layer"] == 2 * (2 * 8 + 1)
    assert result["global_aux_loss_collectives_per_layer"] == 1
    assert result["operations_per_layer"] <= result["global_aux_loss_operations_per_layer"] == 36
    assert result["kernels_per_layer"] <= 20
    demo = result["shapes"]["demo"]
    assert {"step_overhead_percent", "global_aux_loss_overhead_percent", "exposed_wait_percent"} <= result.keys()
    assert demo["breakdown_sum_percent"] == pytest.approx(sum(demo["breakdown_percent"].values()))
    assert all(demo["breakdown_percent"][part] > 0 for part in ("modality_bias", "statistics", "launch"))
    smar, measured = (result["strategies"][name] for name in ("smar", "none"))
    assert smar["shapes"] == result["shapes"]
    assert 0 < measured["operations_per_layer"] < smar["operations_per_layer"], "none has no loss that acts"


def test_ranks_that_cannot_share_the_experts_are_refused_in_a_sentence():
    done = run("benchmarks/smar_overhead.py", "--ranks", 3, check=False)
    assert done.returncode == 2 and "--ranks 3 cannot share 8 experts out; give 2, 4 or 8." in done.stdout


def test_packing_is_compared_with_python_and_megatron_on_the_mixture():
    done = run("benchmarks/packing.py", "--quick", "--image", "llava", "--samples", 20_000, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0.98 < result["fill"] == result["rows"]["Python"]["fill"] <= result["rows"]["ours, all at once"]["fill"]
    assert min(result[name] for name in ("samples_per_second", "ratio_python", "ratio_megatron")) > 0
    assert {row["max_tokens"] for row in result["fills"]} == {2048, 4096, 8192, 16384, 32768}


def test_a_pack_shorter_than_the_longest_text_is_refused_by_the_packing_benchmark():
    done = run("benchmarks/packing.py", "--max-tokens", 1024, check=False)
    assert done.returncode == 2 and "--max-tokens 1024 is too small: give 2048 or more." in done.stdout


@pytest.mark.matrix
def test_both_pipelines_give_the_same_samples_tokens_and_tiles_from_the_same_data():
    small = ("--samples", 24, "--samples-per-turn", 8, "--image-size", 112, "--packing-buffer-size", 12)
    done = run("benchmarks/data.py", "--quick", *small, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    counts = result["counts"]
    assert counts.pop("packs") < counts["samples"] == 24 and counts["tiles"] > 24
    assert counts == result["counts_torch"] and result["far_pixels_share"] <= 1e-3
    assert min(result[name] for name in ("ratio_torch", "samples_per_second")) > 0
    assert result["stages"][result["limit"]]["share"] > 0.2
    # 24 samples say nothing of the speed; the ratio only has to be measured with each number of workers.
    assert set(result["ratio_limit"]) == {"1", "2"} and min(result["ratio_limit"].values()) > 0


@pytest.mark.matrix
def test_a_planned_step_differs_from_a_real_one_in_memory_collectives_or_operations():
    done = run("benchmarks/plan_accuracy.py", "EP 2", "TP 2 x EP 2", "--json", timeout=500)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["communication_exact"] and result["flops_error_percent_max"] < 1
    assert result["memory_error_percent_max"] < 5
    assert {row["case"] for row in result["rows"]} == {"EP 2", "TP 2 x EP 2"}


@pytest.mark.matrix
def test_balanced_vision_is_timed_and_a_wrong_number_of_ranks_refused():
    done = run("benchmarks/vision_balance.py", "--quick", "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert 1 < result["ideal"] < 2 and result["speedup"] > 0 and result["balanced_loss_percent"] > -100
    assert all(1 < result[f"ideal_{replicas}"] < 2 for replicas in (8, 64, 512))
    assert all(most > balanced >= 1 for _, _, most, balanced in result["simulated"])
    done = run("benchmarks/vision_balance.py", "--ranks", 3, check=False)
    assert done.returncode == 2 and "--ranks 3 cannot share the model's 8 experts; give 2, 4 or 8." in done.stdout


@pytest.mark.matrix
def test_a_mixture_of_lengths_is_packed_here_and_padded_there():
    done = run("benchmarks/vs_transformers.py", "--lengths", "llava", "--quick", "--samples", 8, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["lengths"] == "llava" and result["pairs"] == 3 and result["ratio"] > 0


@pytest.mark.matrix
def test_a_long_run_of_the_loader_does_not_retain_memory_of_the_samples_it_has_read():
    done = run("benchmarks/data.py", "--long", "--samples", 3000, "--json")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["slowdown"] > 0 and set(result["modes"]) == {"no worker", "a worker", "a worker, packed"}
    assert all(mode["tenths"][-1]["samples"] >= 3000 for mode in result["modes"].values())
    # A process that keeps its list of tar members grows by 1,300 MB per million samples.
    assert result["megabytes_per_million"] < 500


def test_a_small_batchs_distance_is_not_above_that_of_many_tokens_or_does_not_approach_it():
    command = ("--experts", "8:2", "--tokens", 16, 256, "--batches", 10, "--json")
    done = run("benchmarks/small_batch_distance.py", *command)
    row = json.loads(done.stdout.strip().splitlines()[-1])["8:2"]
    assert row["16"] > 10 * abs(row["256"]) and row["many"] > 0.2


@pytest.mark.matrix
def test_a_layer_with_more_experts_per_token_than_experts_is_refused_in_a_sentence():
    done = run("benchmarks/small_batch_distance.py", "--experts", "2:8", check=False)
    assert done.returncode == 2 and "--experts 2:8 is not E:K" in done.stdout
