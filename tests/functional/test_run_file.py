# SPDX-License-Identifier: Apache-2.0
"""A run as one file, as a user has it: trained, resumed, evaluated and exported without typing the flags again."""

import json

import pytest
import yaml

from megatron_smar.report.scalars import read_scalars
from tests.launch import run


@pytest.fixture(scope="module")
def written(world, tmp_path_factory, single_rank):
    """A run of four steps whose flags are all in a file, but for what the command line overrides."""
    root = tmp_path_factory.mktemp("run_file")
    save = root / "saved"
    from megatron_smar.config.run_file import write_run_file

    steps = "--num-workers 0 --train-iters 9 --save-interval 2 --micro-batch-size 2 --global-batch-size 4".split()
    write_run_file(root, [*map(str, world.flags), *steps, "--save", str(save), "--tensorboard-dir", str(save / "log")])
    run("pretrain_vlm.py", "--config", root / "run.yaml", "--train-iters", 4, ranks=2)
    return save


def test_the_command_line_wins_and_the_resolved_file_resumes_the_run(written):
    content = yaml.safe_load((written / "run.yaml").read_text())
    assert any(group.get("train-iters") == 4 for group in content.values())
    assert read_scalars(written / "log")["lm loss"].steps == [1, 2, 3, 4]
    run("pretrain_vlm.py", "--config", written / "run.yaml", "--train-iters", 6, "--exit-interval", 6, ranks=2)
    assert read_scalars(written / "log")["lm loss"].steps == [1, 2, 3, 4, 5, 6]


def test_evaluate_takes_the_run_file_for_the_checkpoint(world, written, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Name a colour, please. red and green"}) + "\n")
    output = ["--text", tmp_path / "text.jsonl", "--output", tmp_path / "results.json"]
    run("tools/evaluate.py", "--config", written / "run.yaml", *output, ranks=1)
    assert json.loads((tmp_path / "results.json").read_text())["text_perplexity"] > 1


def test_a_mistyped_key_is_the_same_sentence_on_all_ranks(world, tmp_path):
    (tmp_path / "run.yaml").write_text("training:\n  train-iter: 3\n")
    said = world.errors("--config", tmp_path / "run.yaml")
    assert len(set(said)) == 1 and "train-iter is not a flag (close to it: train-iters" in said[0]
