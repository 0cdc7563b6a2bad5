# SPDX-License-Identifier: Apache-2.0
"""The study's programs as a user runs them, on a grid of a few steps."""

import json
from pathlib import Path

import pytest
import yaml

from tests.demo_sources import write_sources
from tests.launch import run
from tests.models import write_language

pytestmark = pytest.mark.matrix  # fourteen programs, most of whose time is their start

STUDY, REPORT = "examples/study/run.py", "examples/study/report.py"
STAGE = {"train-iters": 3, "micro-batch-size": 4, "global-batch-size": 4, "log-interval": 1}
GRID = {
    "data": {
        "corpus": {"vocab-size": 600, "held-out-percent": 20},
        "scenes": {"train-scenes": 64, "held-out-items": 48},
        "vision": {"steps": 3, "batch-size": 8},
    },
    "common": {"expert-model-parallel-size": 1, "num-workers": 0, "no-save-optim": True, "no-save-rng": True},
    "stages": {"stage0": STAGE | {"lr-warmup-iters": 1, "seed": 7}, "stage1": STAGE, "stage2": STAGE},
    "models": {"large": {"num-layers": 2, "hidden-size": 64}},
    "arms": {"hard": {"modality-routing": "hard"}, "broken": {"modality-routing": "none", "train-samples": 4}},
    "tuning": {"seeds": [101], "runs": {}},
    "main": {"runs": {"large": {"hard": 1, "broken": 1}}, "chosen": {}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the study's results; one of its two runs has flags that Megatron refuses."""
    folder = tmp_path_factory.mktemp("study")
    write_sources(folder / "sources")
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    failed = study(folder, check=False)
    assert failed.returncode and "study: 1 runs failed; their logs are in" in failed.stdout
    return folder


def study(folder: Path, *flags: object, check: bool = True):
    places = ["--grid", folder / "grid.yaml", "--output", folder / "work", "--cache", folder / "sources"]
    return run(STUDY, *places, "--results", folder / "results", *flags, timeout=1800, check=check)


def test_a_run_leaves_no_result_or_one_without_a_measure(root):
    result = json.loads((root / "results/main/large/hard/1.json").read_text())
    before, after = result["before"], result["after"]
    assert before.keys() == after.keys()
    assert len(after["mrd_distance"]) == len(after["msi"]) == len(after["load_entropy"]) == 2
    assert after["msi"] == pytest.approx([1, 1]) and max(before["msi"]) < 1  # each modality has its own experts
    crossing = [found["dispatch"]["after"]["vision"]["crossing"] for found in (before, after)]
    assert crossing[1] == 0 < crossing[0] and before["dispatch"]["before"]["all"]["devices"] > 1
    assert len(after["answered"]) * after["vqa_accuracy"] == pytest.approx(after["answered"].count("1"))
    assert sum(after["words_completed"]) > 0 and set(after["texts"]["dispatch"]["after"]) == {"text", "all"}
    assert all(0 < entropy <= 1 for entropy in after["load_entropy"])
    assert after["text_perplexity"] != before["text_perplexity"] > 1
    assert set(after["vqa_by_kind"]) == {"colour", "corner", "count", "object", "pair", "presence"}
    assert result["seconds"] > 0 and result["flags"] == {"modality-routing": "hard"} and result["torch"]
    assert not (root / "work/large/seed-1/main/hard").exists()  # checkpoints do not pile up
    folders = [
        root / "work/large" / name for name in ("seed-7/stage0", "seed-1/stage0", "seed-1/stage1", "seed-7/stage1")
    ]
    assert [folder.exists() for folder in folders] == [True, False, True, False]  # one language model for all seeds


def test_a_run_that_fails_is_not_recorded_and_done_again_unasked(root):
    result = json.loads((root / "results/main/large/broken/1.json").read_text())
    assert "stage2" in result["failed"] or "broken" in result["failed"]
    assert "2 of 2 runs are done" in study(root).stdout
    assert {"main/large/hard/1  done", "main/large/broken/1  failed"} <= set(study(root, "--list").stdout.splitlines())
    shown = run(REPORT, "--grid", root / "grid.yaml", "--results", root / "results").stdout
    assert "Runs: 1 done, 0 missing, 1 failed.\n- main/large/broken/1: " in shown and "hard" in shown


def test_on_slurm_an_element_of_the_job_array_is_not_one_run(root):
    shown = study(root, "--retry", "--slurm=--dry-run --cpu").stdout
    assert "--only main/large/broken/1 --retry" in (root / "work/jobs/sweep.txt").read_text()
    assert "#SBATCH --array=0-0" in shown and "examples/study/run.py" in shown


def test_a_published_language_model_is_no_backbone_or_its_runs_start_from_something_else(tmp_path):
    write_sources(tmp_path / "sources")
    write_language(tmp_path / "language")
    arms = {"none": {"modality-routing": "none"}, "smar": {"modality-routing": "smar", "smar-coeff": 10}}
    changed = {"backbone": "smollm2_moe", "layout": "quick", "language": "language", "models": {"large": {}}}
    stage = {"global-batch-size": 1, "train-iters": 2, "log-interval": 1, "lr": 0.01}
    main = {"runs": {"large": {"none": 1, "smar": 1}}, "chosen": {}}
    content = GRID | changed | {"arms": arms, "stages": {"stage1": stage, "stage3": stage}, "main": main}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    study(tmp_path)
    none, smar = (json.loads((tmp_path / f"results/main/large/{arm}/1.json").read_text()) for arm in arms)
    assert none["before"] == smar["before"] and len(smar["after"]["mrd_distance"]) == 2  # of four layers
    assert none["after"]["mrd_distance"] != smar["after"]["mrd_distance"]
    folder = tmp_path / "work/large/seed-1"
    stage3 = (folder / "main/none.log").read_text()
    assert str(folder / "upcycled/checkpoint") in stage3 and "iteration        2/       2" in stage3
