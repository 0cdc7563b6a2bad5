# SPDX-License-Identifier: Apache-2.0
"""Tests of the runs that tools/scaling.py plans, and of what it refuses."""

import json
from pathlib import Path

import pytest

from megatron_smar.commands.scaling import Result, efficiency, experiment, main, make_parser, points

COMMAND = ["pretrain_vlm.py", "--lr", "1e-4", "--global-batch-size", "8"]


def planned(tmp_path, *options, command=COMMAND):
    return points(make_parser().parse_args([str(tmp_path), *options]), command)


def flag(point, name):
    return point.words[point.words.index(name) + 1]


def test_weak_scaling_keeps_the_batch_or_strong_scaling_changes_it(tmp_path):
    weak = planned(tmp_path, "--processes", "2", "4", "8", "--mode", "weak")
    assert [flag(point, "--global-batch-size") for point in weak] == ["8", "16", "32"]
    strong = planned(tmp_path, "--processes", "2", "4", "--mode", "strong")
    assert all("--global-batch-size" not in point.words for point in strong)


def test_a_combination_of_varied_flags_is_missing_or_shares_a_folder_with_another(tmp_path):
    vary = ["--vary", "modality-routing=none,smar", "--vary", "micro-batch-size=1,2,4"]
    found = planned(tmp_path, "--processes", "1", "2", *vary)
    assert len({point.folder for point in found}) == len({(point.processes, point.line) for point in found}) == 12
    assert found[0].line == "modality-routing none, micro-batch-size 1"
    for point in found:
        assert Path(flag(point, "--tensorboard-dir")).parent == point.folder
        assert flag(point, "--modality-routing") == point.varied["modality-routing"]


def test_efficiency_is_relative_to_another_run_than_the_smallest_with_the_same_flags():
    results = [Result(n, line, {"tokens_per_second": t}, (0, 0), 9) for n, line, t in [(2, "a", 100), (2, "b", 10)]]
    results += [Result(4, "a", {"tokens_per_second": 150}, (0, 0), 9)]
    assert [efficiency(result, results) for result in results] == [1, 1, 0.75]


@pytest.mark.parametrize(
    ("options", "command", "sentence"),
    [
        ([], [], "has no experiment; give a command after --"),
        ([], [*COMMAND, "--save", "x"], "the command has --save, and runs that are measured save no checkpoints"),
        (["--vary", "lr"], COMMAND, "--vary lr has no values; give NAME=VALUE,VALUE"),
        (["--vary", "lr=1,,2"], COMMAND, "--vary lr=1,,2 has no values"),
        (["--steps", "6"], COMMAND, "--steps 6 and --warm-up 5 leave nothing to measure"),
        (["--processes", "0"], COMMAND, "--processes 0 is below 1"),
        (["--mode", "weak"], COMMAND[:3], "--mode weak needs --global-batch-size in the command"),
        (["--mode", "weak", "--processes", "3", "4"], COMMAND, "--global-batch-size 8 cannot grow from 3 to 4"),
        (["--processes", "12", "--slurm=--dry-run"], COMMAND, "12 processes do not fill nodes of 8"),
    ],
)
def test_an_experiment_that_cannot_run_is_started(tmp_path, capsys, options, command, sentence):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "new"), *options, *(["--", *command] if command else [])])
    assert sentence in capsys.readouterr().err


def test_a_folder_takes_the_results_of_another_experiment(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(json.dumps({"processes": [1], "command": ["other.py"]}))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--", *COMMAND])
    assert "has another experiment" in capsys.readouterr().err


def test_a_folder_is_spoilt_for_the_right_command_by_a_wrong_one(tmp_path):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--", *COMMAND, "--save", "x"])
    assert experiment(make_parser().parse_args([str(tmp_path)]), COMMAND)[0] == COMMAND
    assert json.loads((tmp_path / "experiment.json").read_text())["command"] == COMMAND
