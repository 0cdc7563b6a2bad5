# SPDX-License-Identifier: Apache-2.0
"""The demo and its comparison of strategies as a user runs them, reduced to a few steps (--quick)."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.demo_sources import write_sources
from tests.launch import run

DEMO, COMPARE = "examples/emoji_tiny/run.py", "examples/emoji_tiny/compare.py"
VARIANTS = ["none", "hard"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with the demo's shared steps in `demo`, two variants beside it, and their comparison."""
    folder = tmp_path_factory.mktemp("demo")
    write_sources(folder / "sources")
    compare(folder)
    return folder


def compare(folder: Path, *flags: object, check: bool = True):
    places = ["--base", folder / "demo", "--cache", folder / "sources", "--output", folder / "compare"]
    return run(COMPARE, "--quick", *places, "--variants", *VARIANTS, *flags, timeout=1800, check=check)


def demo(folder: Path, *flags: object, check: bool = True):
    places = ["--output", folder / "demo", "--cache", folder / "sources"]
    return run(DEMO, "--quick", *places, *flags, timeout=1800, check=check)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.matrix
def test_the_comparison_has_what_each_variant_measured_from_the_same_start(root):
    content = json.loads((root / "compare" / "compare.json").read_text())
    start, *rows = content["rows"]
    before = results(root / "demo" / "evaluation_stage1")
    assert [row["routing"] for row in rows] == VARIANTS and start["retention"] == 1
    for row in rows:
        folder = root / f"demo-{row['routing']}"
        after = results(folder / "evaluation_stage2")
        started = yaml.safe_load((folder / "stage2" / "run.yaml").read_text())
        flags = {name: value for group in started.values() for name, value in group.items()}
        assert flags["load"] == str(root / "demo" / "stage1") and flags["modality-routing"] == row["routing"]
        assert row["text_perplexity"] == after["text_perplexity"] != before["text_perplexity"]
        assert row["vqa_accuracy"] == after["vqa_accuracy"]
        assert row["retention"] == pytest.approx(after["word_accuracy"] / before["word_accuracy"])
        assert row["mrd_distance"] == pytest.approx(sum(after["mrd_distance_by_layer"]) / 4)
        assert row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["is_current"]
    none, hard = rows
    assert hard["msi"] == pytest.approx(1) and none["msi"] < 0.9  # with experts of their own nothing is shared
    assert hard["crossing"] == 0 and 0 < none["crossing"] < 1  # each modality's experts are one half
    placed = json.loads((root / "demo-none" / "placement" / "report.json").read_text())["devices"]["2"]
    assert none["crossing_placed"] == placed["after"]["all"]["crossing"]
    assert (root / "compare" / "compare.png").stat().st_size > 10_000


@pytest.mark.matrix
def test_what_is_done_is_not_run_again_and_the_table_goes_between_the_marks_of_a_document(root, tmp_path):
    document = tmp_path / "strategies.md"
    marks = ("<!-- written by examples/emoji_tiny/compare.py --write -->", "<!-- end of the comparison -->")
    document.write_text(f"before\n\n{marks[0]}\nold\n{marks[1]}\n\nafter\n")
    said = compare(root).stdout
    assert "stage2: done before" in said and " ...\n" not in said
    refused = compare(root, "--write", document, check=False)
    assert refused.returncode == 2 and "leave out --quick" in refused.stdout
    assert "old" in document.read_text()
    table = (root / "compare" / "compare.md").read_text()
    assert "One run of each, seed 1234" in table and "| none |" in table and "| hard |" in table


@pytest.mark.matrix
def test_the_page_of_a_strategy_without_a_band_has_none_and_reuses_every_step(root):
    said = demo(root, "--routing", "hard").stdout
    assert " ...\n" not in said, "a step ran again"
    assert "band" not in said and "Retention of language" in said
    page = (root / "demo-hard" / "report.html").read_text()
    assert "inside the band" not in page and "<dt>Band</dt>" not in page and "--hard" not in page
    report = json.loads((root / "demo-hard" / "report.json").read_text())
    assert report["band"] is None and report["config"]["routing"]["strategy"] == "hard"
    commands = [line for line in report["commands"] if "--modality-routing hard" in line]
    assert len(commands) == 1 and "stage1" in commands[0]
    assert "smar loss" not in report["history"]["stage2"]


@pytest.mark.matrix
def test_a_comparison_over_seeds_is_not_paired_or_repeats_one_seed(root):
    demo(root, "--routing", "hard", "--compare", "--seeds", 5, 6)
    report = json.loads((root / "demo-hard" / "report.json").read_text())
    kept = {}
    before = results(root / "demo" / "evaluation_stage1")["word_accuracy"]
    for seed in (5, 6):
        for name in VARIANTS:
            folder = root / f"demo-{name}-seed-{seed}"
            started = yaml.safe_load((folder / "stage2" / "run.yaml").read_text())
            assert {name: value for group in started.values() for name, value in group.items()}["seed"] == seed
            kept[name, seed] = results(folder / "evaluation_stage2")["word_accuracy"] / before
    found = report["paired"]["differences"]["retention"]
    assert report["paired"]["seeds"] == 2 and found["p"] in (0.5, 1)
    assert found["mean"] == pytest.approx(sum(kept["hard", seed] - kept["none", seed] for seed in (5, 6)) / 2)


@pytest.mark.matrix
def test_a_checkpoint_that_is_not_stage_1_is_refused_whatever_its_folder_says(root, tmp_path):
    record = (root / "demo" / "stage1" / ".done.json").read_text()
    kept = tmp_path / "kept"
    shutil.move(root / "demo" / "stage1", kept)
    try:
        shutil.copytree(root / "demo" / "stage0", root / "demo" / "stage1")
        (root / "demo" / "stage1" / ".done.json").write_text(record)
        done = demo(root, "--routing", "none", check=False)
        assert done.returncode == 1
        assert "stage1 was trained with freeze ['vision', 'connector'] instead of" in done.stdout
    finally:
        shutil.rmtree(root / "demo" / "stage1")
        shutil.move(kept, root / "demo" / "stage1")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--routing", "nowhere"], "demo: there is no routing nowhere; give one of smar, none"),
        (["--routing", "none", "--compare"], "demo: --compare compares with --routing none: give another routing."),
        (["--seeds", "1"], "run.py: error: --seeds repeats a comparison: give --compare too"),
        (["--set", "smar-coef=1"], "demo: smar: smar-coef is not a flag (close to it: smar-coeff"),
    ],
)
def test_a_wrong_routing_is_one_sentence_before_anything_runs(tmp_path, flags, sentence):
    done = demo(tmp_path, *flags, check=False)
    assert done.returncode in (1, 2) and sentence in done.stdout and " ...\n" not in done.stdout
    assert not (tmp_path / "demo").exists()
