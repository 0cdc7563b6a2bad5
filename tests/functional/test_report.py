# SPDX-License-Identifier: Apache-2.0
"""The report of a plain run of pretrain_vlm.py, as a user makes it."""

import json
import re

import pytest

from tests.launch import TWO_STEPS, run

SMAR = ["--modality-routing", "smar", "--smar-d-min", "0.5", "--smar-d-max", "1"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run's folder: six steps, evaluated, with a sample that had to be skipped."""
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    steps = [*TWO_STEPS, "--train-iters", 6, "--save", folder, "--save-interval", 6]
    world.train(*SMAR, *steps, "--tensorboard-dir", folder / "tensorboard", "--rejects-dir", folder / "rejects")
    (folder / "rejects").mkdir(exist_ok=True)
    reject = {"key": "00007", "reason": "image_count_mismatch", "message": "1 <image> tag but 0 images"}
    (folder / "rejects" / "train-rank0-worker0.jsonl").write_text(json.dumps(reject) + "\n")
    asked = {"question": "<image>\nWhich colours are these?", "answer": "red", "image": "red.png", "kind": "colour"}
    (folder / "vqa.json").write_text(json.dumps([asked]))
    measured = ["--vqa", folder / "vqa.json", "--image-root", world.root, "--output", folder / "results.json"]
    run("tools/evaluate.py", "--load", folder, *measured, ranks=1)
    return folder


def test_the_page_of_a_plain_run_shows_what_it_logged_and_what_was_evaluated(world, finished):
    said = run("tools/report.py", finished, "--image-root", world.root).stdout
    for measure in ("lm loss", "smar loss", "mrd distance", "seconds per step", "picture questions", "skipped samples"):
        assert measure in said, measure
    page = (finished / "report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    for title in (
        "How differently vision and text are routed",
        "Which experts serve which modality",
        "The experts&#x27; load during training",
        "Losses",
        "Throughput",
        "Skipped samples",
        "Questions about pictures, by kind",
        "Examples",
        "Settings",
    ):
        assert title in titles, (title, titles)
    assert "image_count_mismatch" in page and "band 0.5 to 1" in page and "Which colours are these?" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "<script" not in page
    report = json.loads((finished / "report.json").read_text())
    assert report["history"]["lm loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert report["settings"]["modality-aware routing"] == {
        "modality_routing": "smar",
        "smar_d_min": 0.5,
        "smar_d_max": 1.0,
    }
    assert len(report["step_seconds"]["values"]) == 5 and min(report["step_seconds"]["values"]) > 0


def test_a_folder_of_logs_alone_has_a_report_and_one_without_names_what_is_missing(finished, tmp_path):
    run("tools/report.py", finished / "tensorboard", "--output", tmp_path / "report")
    assert "Losses" in (tmp_path / "report" / "report.html").read_text()
    done = run("tools/report.py", tmp_path, check=False)
    assert done.returncode == 2 and "holds no TensorBoard event files" in done.stdout
