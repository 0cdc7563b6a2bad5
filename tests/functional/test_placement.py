# SPDX-License-Identifier: Apache-2.0
"""tools/placement.py as a user runs it: plan, report, apply, train on, undo."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_smar.report.scalars import read_scalars
from tests.functional.conftest import COLOURS
from tests.launch import TWO_STEPS, run

PROGRAM = "tools/placement.py"
EP_2 = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]
SMAR = ["--modality-routing", "smar", "--smar-d-min", "3", "--smar-d-max", "4", "--smar-coeff", "0.1"]
# Later flags win: four steps, a checkpoint after the second.
TRAINING = [*TWO_STEPS, *SMAR, *EP_2, "--num-experts", "8", "--train-iters", "4", "--save-interval", "2"]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """Trains a mixture of eight experts for four steps under EP 2; returns the --save folder."""
    folder = tmp_path_factory.mktemp("trained") / "save"
    world.train(*TRAINING, "--save", folder, "--tensorboard-dir", folder / "log", ranks=2)
    return folder


@pytest.fixture(scope="module")
def samples(world, tmp_path_factory) -> list[object]:
    """Returns the options that name held-out texts and visual questions."""
    folder = tmp_path_factory.mktemp("samples")
    questions = [
        {"image": f"{name}.png", "question": "<image>\nWhich colour is this?", "answer": name} for name in COLOURS
    ]
    texts = [{"text": f"red and {name} and blue and white, please. " * (3 + n)} for n, name in enumerate(COLOURS)]
    (folder / "vqa.json").write_text(json.dumps(questions))
    (folder / "text.json").write_text(json.dumps(texts[:3]))
    return ["--text", folder / "text.json", "--vqa", folder / "vqa.json", "--image-root", world.root]


@pytest.fixture(scope="module")
def placed(trained, samples, tmp_path_factory) -> Path:
    """Plans on two ranks and applies the plan to step 2; returns the folder with the plan and the new checkpoint."""
    folder = tmp_path_factory.mktemp("placed")
    step = ["--load", trained, "--ckpt-step", 2]
    said = run(PROGRAM, "plan", *step, "--devices", 2, *samples, "--output", folder / "plan.json", ranks=2).stdout
    assert "8 experts on 2 devices, by loads counted on 7 samples" in said
    said = run(PROGRAM, "apply", *step, "--plan", folder / "plan.json", "--output", folder / "save").stdout
    assert re.search(r"save is written: .*, placed for 2 devices, [\d.]+ MB; load it with --load\.", said)
    return folder


def test_a_plan_cuts_the_experts_sorted_by_their_share_of_text(placed):
    plan = json.loads((placed / "plan.json").read_text())
    assert list(plan["layers"]) == ["1", "2"] and plan["devices"] == 2
    for layer in plan["layers"].values():
        shares = [layer["text_share"][expert] for expert in layer["order"]]
        assert shares == sorted(shares) and shares[0] < shares[-1]
        assert sorted(layer["order"]) == list(range(8))


def test_a_run_goes_on_from_the_placed_checkpoint_as_from_its_own(world, trained, placed, tmp_path):
    world.train(*TRAINING, "--load", placed / "save", "--save", tmp_path / "on", "--tensorboard-dir", tmp_path, ranks=2)
    expected, found = read_scalars(trained / "log"), read_scalars(tmp_path)
    for name in ("lm loss", "smar loss", "mrd distance"):
        pairs = [dict(zip(values[name].steps, values[name].values, strict=True)) for values in (expected, found)]
        assert list(pairs[1]) == [3, 4], "the step and the position in the data are continued"
        assert all(abs(pairs[0][step] - pairs[1][step]) <= 1e-6 for step in (3, 4)), (name, pairs)


def test_the_report_is_the_same_from_the_plan_and_from_the_placed_checkpoint(trained, placed, samples, tmp_path):
    plan = ["--load", trained, "--ckpt-step", 2, "--plan", placed / "plan.json"]
    said = run(PROGRAM, "report", *plan, *samples, *EP_2[:2], "--output", tmp_path / "plan.json", ranks=2).stdout
    own = ["--load", placed / "save", "--batch-size", "4"]
    files = ["--output", tmp_path / "own.json", "--figure", tmp_path / "own.svg", "--json"]
    printed = json.loads(run(PROGRAM, "report", *own, *samples, *files).stdout.splitlines()[-1])
    found, again = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "own.json"))
    assert list(found["devices"]) == ["2", "4", "8"] and set(found["tokens"]) == {"text", "vision", "padding"}
    assert found["tokens"]["vision"] == again["tokens"]["vision"] > 0
    for number, values in found["devices"].items():
        for when in ("before", "after"):
            for scope, numbers in values[when].items():
                assert numbers == pytest.approx(again["devices"][number][when][scope]), (number, when, scope)
    two = found["devices"]["2"]
    assert two["floor"]["devices_per_token"] == 1 and two["chance"]["crossing"] == pytest.approx(1 - 12 / 28)
    assert printed["crossing_after_vision"] == again["devices"]["2"]["after"]["vision"]["crossing"]
    assert "before -> after" in said and "cut reached" in said
    assert (tmp_path / "plan.png").stat().st_size > 5000 and "<svg" in (tmp_path / "own.svg").read_text()


@pytest.fixture
def place(capsys, monkeypatch, single_rank):
    """Runs placement.py in this process; returns exit status and output. For what needs no model."""
    from megatron_smar.commands.placement import main

    def call(*argv: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["placement.py", *map(str, argv)])
        capsys.readouterr()
        try:
            main()
            status: object = 0
        except SystemExit as end:
            status = end.code
        written = capsys.readouterr()
        return status, written.out + written.err

    return call


def test_undoing_gives_every_bit_back_and_inspect_shows_what_was_done(trained, placed, convert, tmp_path):
    from megatron_smar.checkpoint.torch_dist import CheckpointReader

    run(PROGRAM, "apply", "--load", placed / "save", "--undo", "--output", tmp_path / "back")
    assert "placement    for 2 devices: " in convert("inspect", placed / "save")[1]
    assert "\nplacement" not in convert("inspect", tmp_path / "back")[1]
    first, back = CheckpointReader(trained, 2), CheckpointReader(tmp_path / "back")
    assert first.tensors.keys() == back.tensors.keys()
    for key, data in first.tensors.items():
        everything = (0,) * len(data.size), tuple(data.size)
        assert torch.equal(first.read(key, *everything), back.read(key, *everything)), key


BAD = {
    "no loads": (
        ["plan", "--load", "SAVE", "--devices", 2, "--output", "OUT"],
        "keeps no loads of its experts (--modality-routing smar): give samples to count them on, --text or --vqa.",
    ),
    "devices": (
        ["plan", "--load", "SAVE", "--devices", 3, "--output", "OUT"],
        "--devices is 3, but the model's 8 experts are shared equally among the devices: give one of 2, 4, 8.",
    ),
    "no checkpoint": (["plan", "--load", "NONE", "--devices", 2, "--output", "OUT"], "is not a folder"),
    "no samples": (["report", "--load", "SAVE", "--output", "OUT"], "report counts on samples: give --text, --vqa"),
    "no placement": (
        ["report", "--load", "SAVE", "--output", "OUT", "--text", "TEXT"],
        "has not been placed: give the plan to report on, --plan.",
    ),
    "never placed": (["apply", "--load", "SAVE", "--undo", "--output", "OUT"], "has no placement to undo"),
    "no plan": (["apply", "--load", "SAVE", "--plan", "TEXT", "--output", "OUT"], "holds no plan"),
    "output": (["apply", "--load", "PLACED", "--undo", "--output", "SAVE"], "exists already; give a new folder."),
    "unknown flag": (["apply", "--load", "SAVE", "--undo", "--output", "OUT", "--bf16"], "unrecognized arguments"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(trained, placed, samples, place, tmp_path, name):
    argv, said = BAD[name]
    names = {"SAVE": trained, "PLACED": placed / "save", "NONE": tmp_path / "none", "TEXT": samples[1]}
    status, output = place(*(names.get(word, tmp_path / "out" if word == "OUT" else word) for word in argv))
    assert status not in (0, None) and said in output
    assert not (tmp_path / "out").exists() and "Traceback" not in output
