# SPDX-License-Identifier: Apache-2.0
"""Every routing strategy, as a user runs it: from a checkpoint without it to resuming, evaluation and export."""

import json

import pytest

from megatron_smar.report.scalars import read_scalars
from megatron_smar.routing.strategies import STRATEGIES
from tests.launch import run

EXPERTS = ["--expert-model-parallel-size", 2]
# Flags that a strategy needs to act noticeably on this small model.
FLAGS: dict[str, list[object]] = {
    "none": [],
    "smar": ["--smar-d-min", 3, "--smar-d-max", 4, "--smar-coeff", 0.1],
    "smoes": ["--smoes-information-coeff", 0.1, "--smoes-balance-coeff", 0.1],
    "hard": [],
    "layer_split": ["--layer-split-layers", 1],
    "modality_gates": [],
    "moiie": ["--moiie-coeff", 0.1],
    "label_ce": ["--label-ce-coeff", 0.1],
    "modality_balance": ["--modality-balance-coeff", 0.1],
    "ernie": ["--ernie-balance-coeff", 0.1, "--ernie-bias-rate", 0.05],
}


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory):
    """Returns a checkpoint of the backbone's own routing."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--micro-batch-size", 4, "--global-batch-size", 8, "--train-iters", 1, "--num-workers", 1]
    world.train(*flags, *EXPERTS, "--save", folder, "--save-interval", 1, "--no-save-optim", ranks=2)
    return folder


def test_every_strategy_of_the_registry_is_run_here():
    assert set(FLAGS) == set(STRATEGIES)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FLAGS)
def test_a_strategy_starts_from_a_checkpoint_without_it_resumes_bit_identically_and_is_evaluated(
    world, pretrained, tmp_path, name
):
    common = ["--modality-routing", name, *FLAGS[name], *EXPERTS, "--load", pretrained, "--finetune"]
    common += ["--micro-batch-size", 2, "--global-batch-size", 8, "--num-workers", 1, "--train-iters", 6]
    common += ["--save-interval", 3, "--use-distributed-optimizer"]
    world.train(*common, "--save", tmp_path / "a", "--tensorboard-dir", tmp_path / "uninterrupted", ranks=2)
    stop = ["--save", tmp_path / "b"]
    world.train(*common, *stop, "--exit-interval", 3, "--tensorboard-dir", tmp_path / "first", ranks=2)
    world.train(*common, *stop, "--tensorboard-dir", tmp_path / "second", ranks=2)
    undisturbed, resumed = read_scalars(tmp_path / "uninterrupted"), read_scalars(tmp_path / "second")
    names = ["lm loss", "grad-norm", *(metric.name for metric in STRATEGIES[name].metrics if not metric.weighted)]
    for each in names:
        whole = dict(zip(undisturbed[each].steps, undisturbed[each].values, strict=True))
        assert resumed[each].steps == [4, 5, 6]
        assert {step: whole[step] for step in (4, 5, 6)} == dict(zip((4, 5, 6), resumed[each].values, strict=True)), (
            each
        )
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "You may reproduce and distribute copies of the Work."}))
    measured = ["--text", tmp_path / "text.jsonl", "--output", tmp_path / "results.json"]
    run("tools/evaluate.py", "--load", tmp_path / "a", *EXPERTS, *measured, ranks=2)
    assert json.loads((tmp_path / "results.json").read_text())["text_perplexity"] > 1
