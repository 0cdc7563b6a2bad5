# SPDX-License-Identifier: Apache-2.0
"""tools/scaling.py as a user starts it: real runs, started twice, and the job arrays that it would submit."""

import json

import pytest

from tests.launch import run

SIZES = ["--global-batch-size", 8, "--micro-batch-size", 2, "--num-workers", 0]


@pytest.mark.matrix
def test_an_experiment_is_measured_twice_or_not_at_all_or_its_results_are_lost(world, tmp_path):
    folder = tmp_path / "scaling"
    command = ["tools/scaling.py", folder, "--vary", "modality-routing=none,smar", "--steps", 4, "--warm-up", 1]
    said = run(*command, "--", "pretrain_vlm.py", *world.flags, *SIZES).stdout
    assert "run 2 of 2, ETA " in said and (folder / "scaling.svg").is_file()
    results = json.loads((folder / "scaling.json").read_text())
    assert [(result["line"], result["steps"]) for result in results] == [
        ("modality-routing none", 3),
        ("modality-routing smar", 3),
    ]
    assert all(rate > 0 for result in results for rate in result["rates"].values())
    again = run(*command, "--", "pretrain_vlm.py", *world.flags, *SIZES).stdout
    assert "run 1 of" not in again and "modality-routing smar" in again
    assert "modality-routing smar" in run("tools/scaling.py", folder).stdout


@pytest.mark.matrix
def test_runs_on_several_nodes_are_not_submitted_as_one_array_for_each_number_of_nodes(world, tmp_path):
    command = ["tools/scaling.py", tmp_path, "--processes", 2, 4, "--processes-per-node", 2, "--mode", "weak"]
    command += ["--vary", "modality-routing=none,smar", "--slurm=--dry-run --cpu --no-preflight"]
    said = run(*command, "--", "pretrain_vlm.py", *world.flags, *SIZES).stdout
    assert said.count("#SBATCH --array=0-1\n") == 2
    assert "#SBATCH --nodes=1\n" in said and "#SBATCH --nodes=2\n" in said
    assert said.count("--global-batch-size 16 ") == 2 and "4 of 4 runs are not complete." in said
