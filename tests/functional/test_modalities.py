# SPDX-License-Identifier: Apache-2.0
"""A run with text and two kinds of images, from records to the evaluation's results."""

import json

import pytest

from megatron_smar.report.scalars import read_scalars
from tests.functional.conftest import make_records
from tests.launch import TWO_STEPS, run

THREE = ["--image-modalities", "vision", "chart"]
SMAR = ["--modality-routing", "smar", "--smar-d-min", "3", "--smar-d-max", "4", "--smar-coeff", "0.1"]


@pytest.fixture(scope="module")
def charts(world, tmp_path_factory) -> list[object]:
    """Flags of data in which the second image of two, and every third single one, is a chart."""
    root = tmp_path_factory.mktemp("charts")
    records = make_records(root, 60)
    for number, record in enumerate(records):
        if len(record["image"]) == 2:
            record["image_modality"] = ["vision", "chart"]
        elif record["image"] and number % 9 == 1:
            record["image_modality"] = "chart"
    (root / "train.json").write_text(json.dumps(records))
    run("tools/data/prepare.py", "--train", root / "train.json", "--image-root", root, "--output", root / "shards")
    tokenizer = root / "tokenizer.model"
    run("tools/data/add_tokens.py", world.root / "tokenizer.model", tokenizer, "--also", "<CHART_CONTEXT>")
    return ["--data-path", root / "shards", "--tokenizer-model", tokenizer]


def test_a_run_trains_with_three_modalities_and_reports_each_of_them(world, charts, tmp_path):
    saved, log = tmp_path / "saved", tmp_path / "log"
    flags = [*charts, *THREE, *SMAR, *TWO_STEPS, "--save", saved, "--save-interval", 2, "--tensorboard-dir", log]
    world.train(*flags, "--expert-model-parallel-size", 2, ranks=2)
    written = read_scalars(log)
    shares = [written[f"moe/token_share/{name}"].values[-1] for name in ("text", "vision", "chart")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.01
    assert written["smar loss"].values[-1] > 0
    turns = {"question": "<image>\nWhich colours are these?", "answer": "red"}
    asked = [turns | {"image": "red.png", "image_modality": "chart"}, turns | {"image": "red.png"}]
    (tmp_path / "vqa.json").write_text(json.dumps(asked))
    measured = ["--vqa", tmp_path / "vqa.json", "--image-root", world.root, "--output", tmp_path / "results.json"]
    run("tools/evaluate.py", "--load", saved, *measured, ranks=1)
    found = json.loads((tmp_path / "results.json").read_text())["expert_share"]
    assert list(found) == ["text", "vision", "chart"]
    assert all(sum(layer) == pytest.approx(1) for layers in found.values() for layer in layers)


def test_a_tokenizer_without_a_kinds_placeholder_is_named_before_anything_is_built(world):
    for sentence in world.errors(*THREE, *TWO_STEPS):
        assert "has no token <CHART_CONTEXT>" in sentence and "--also '<CHART_CONTEXT>'" in sentence


def test_images_of_a_kind_that_the_run_does_not_have_are_rejected_with_their_kind(world, charts, tmp_path):
    world.train(*charts, *TWO_STEPS, "--rejects-dir", tmp_path)
    assert "unknown_modality" in run("tools/data/rejects.py", tmp_path).stdout
    (listed,) = tmp_path.glob("*.jsonl")
    assert "`image_modality` is 'chart', and --image-modalities has vision" in listed.read_text()
