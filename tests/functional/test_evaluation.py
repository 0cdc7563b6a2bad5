# SPDX-License-Identifier: Apache-2.0
"""tools/evaluate.py on benchmarks and language tasks, and benchmarks during training, on a small trained model."""

import json
import shutil
from pathlib import Path

import pytest

from tests.functional.conftest import World
from tests.launch import TWO_STEPS, run, run_each_rank

NUMBER = 4  # pictures of the benchmarks' files
EXPERTS = ["--expert-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def benchmarks(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes POPE and MME in their published layouts, with the world's pictures; one of POPE's is not a picture."""
    from megatron_smar.evaluation.benchmarks.mme import COGNITION, PERCEPTION

    root = tmp_path_factory.mktemp("benchmarks")
    pictures = [world.root / f"{name}.png" for name in ("red", "green", "blue", "white")]
    (root / "pope" / "val2014").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        shutil.copy(picture, root / "pope" / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    (root / "pope" / "val2014" / f"COCO_val2014_{NUMBER:012d}.jpg").write_text("no picture")
    for category in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": number + 1,
                "image": f"COCO_val2014_{number // 2:012d}.jpg",
                "text": "Is there a dog in the image?",
                "label": ("yes", "no")[number % 2],
            }
            for number in range(2 * NUMBER + 1)
        ]
        (root / "pope" / f"coco_pope_{category}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for subtask in PERCEPTION + COGNITION:
        (root / "mme" / subtask).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            shutil.copy(picture, root / "mme" / subtask / f"{number}.png")
            text = "Is it red? Please answer yes or no.\tYes\nIs it green? Please answer yes or no.\tNo\n"
            (root / "mme" / subtask / f"{number}.txt").write_text(text)
    return root


def evaluate(saved: Path, output: Path, *flags: object, ranks: int = 1, **options: object):
    command = ["tools/evaluate.py", "--load", saved, "--batch-size", 4, "--output", output, *flags]
    return run(*command, ranks=ranks, **options)


def results(path: Path) -> dict:
    return json.loads(path.read_text())


def test_benchmarks_give_the_same_answers_on_one_rank_and_on_two_and_name_the_bad_sample(saved, benchmarks, tmp_path):
    asked = ["--benchmarks", "pope", "mme", "--benchmarks-data", benchmarks, "--limit", 28]
    evaluate(saved, tmp_path / "one.json", *asked)
    said = evaluate(saved, tmp_path / "two.json", *asked, *EXPERTS, ranks=2).stdout
    one, two = (results(tmp_path / f"{name}.json")["benchmarks"] for name in ("one", "two"))
    for name in ("pope", "mme"):
        lines = [(tmp_path / ranks / f"{name}.jsonl").read_text().splitlines() for ranks in ("one", "two")]
        assert lines[0] == lines[1]
        assert one[name]["unfinished"] == sum('"unfinished": true' in line for line in lines[0])
        assert one[name]["metrics"] == two[name]["metrics"] != {}
        near = [run[name]["routing"]["mrd_distance_by_layer"] for run in (one, two)]
        assert near[0] == pytest.approx(near[1], rel=1e-4) and set(near[0]) == {"1", "2"}
    assert one["pope"]["asked"] == 3 * 2 * NUMBER and one["mme"]["asked"] == 28
    assert len(one["pope"]["skipped"]) == 3 and "skipped" in said
    assert all("cannot" in sample["reason"] for sample in one["pope"]["skipped"])


@pytest.mark.matrix
def test_an_interrupted_evaluation_resumes_with_the_predictions_that_are_there(saved, benchmarks, tmp_path):
    output = tmp_path / "results.json"
    asked = ["--benchmarks", "pope", "--benchmarks-data", benchmarks, "--limit", 12]
    evaluate(saved, output, *asked)
    whole, path = results(output), tmp_path / "results" / "pope.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1]) | {"prediction": "from the first run"}
    path.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:5], lines[5][:9]]))
    evaluate(saved, output, *asked)
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    assert resumed[1]["prediction"] == "from the first run"
    assert resumed[2:] == [json.loads(line) for line in lines[2:]]
    assert results(output)["benchmarks"]["pope"]["asked"] == whole["benchmarks"]["pope"]["asked"]
    refused = evaluate(saved, output, *asked, "--float32", check=False)
    assert refused.returncode != 0 and "holds predictions of" in refused.stdout


def test_benchmarks_that_cannot_be_read_are_refused_before_the_model_is_loaded(saved, benchmarks, tmp_path):
    command = ["tools/evaluate.py", "--load", saved, "--output", tmp_path / "results.json"]
    (done,) = run_each_rank(*command, "--benchmarks", "gqa", "--benchmarks-data", benchmarks, ranks=1, check=False)
    assert done.returncode != 0 and "gqa is not a folder: give the one with" in done.stdout
    assert "building VisionLanguageModel" not in done.stdout and "Traceback" not in done.stdout


@pytest.mark.matrix
def test_training_with_benchmarks_logs_and_saves_them_and_changes_no_step(world, benchmarks, tmp_path):
    valid = ["--eval-iters", "1", "--eval-interval", "1"]
    asked = ["--eval-benchmarks", "pope", "mme", "--eval-benchmarks-data", benchmarks, "--eval-benchmarks-samples", 28]
    layout = [*EXPERTS, "--eval-micro-batch-size", "4"]
    plain = world.train(*TWO_STEPS, *valid, *layout, ranks=2).stdout
    done = world.train(*TWO_STEPS, *valid, *layout, *asked, "--save", tmp_path, "--save-interval", 2, ranks=2).stdout
    assert _losses(done) == _losses(plain) != []
    assert "POPE at iteration 1 | f1" in done and "MME at iteration 2 | perception" in done
    saved_results = results(tmp_path / "benchmarks" / "iter_0000002" / "results.json")["benchmarks"]
    assert saved_results["mme"]["asked"] == 28 and saved_results["pope"]["routing"]["mrd_distance_by_layer"]


def _losses(output: str) -> list[str]:
    return [line.split("lm loss")[1].split("|")[0] for line in output.splitlines() if "lm loss:" in line]


def test_benchmarks_that_training_cannot_read_are_refused_at_the_start(world, benchmarks):
    given = ["--eval-iters", "1", "--eval-benchmarks", "gqa", "--eval-benchmarks-data", benchmarks, *TWO_STEPS]
    assert all("gqa is not a folder" in sentence for sentence in world.errors(*given))
