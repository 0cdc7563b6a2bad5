# SPDX-License-Identifier: Apache-2.0
"""The study's grid, splits, order of runs and failures."""

import argparse
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.examples.study_grids import ROOT, read  # first: it knows where the programs are

# isort: split
import backbones
import grid
import pool
import programs
import study_data
from steps import StepError

import runs
from megatron_smar.runtime import environment


def test_runs_are_not_those_of_the_grid_seed_by_seed(tmp_path: Path) -> None:
    assert [run.name for run in read(tmp_path).runs()] == [
        "tuning/large/none/101",
        "tuning/large/smar__smar-coeff_0.1/101",
        "tuning/large/smar__smar-coeff_1/101",
        "tuning/large/smar__lr_0.1/101",
        "main/large/none/1",
        "main/large/smar/1",
        "main/large/none/2",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"main": {"runs": {"large": {"smare": 1}}}}, "there is no arm smare; give one of none, smar"),
        ({"main": {"runs": {"huge": {"smar": 1}}}}, "there is no model huge; give one of large, small"),
        ({"arms": {"none": {"modality-routing": "none"}, "smar": {"smar-coef": 1}}}, "smar-coef is not a flag"),
        (
            {"arms": {"none": {"modality-routing": "none"}, "smar": {"modality-routing": "none", "smar-coeff": 1}}},
            "smar has --smar-coeff, which trains nothing with --modality-routing none; leave it out",
        ),
        ({"main": {"runs": {"large": {"none": 101}}}}, r"seeds \[101\] are of tuning and main"),
        ({"main": {"runs": {}, "chosen": {"large": {"smare": {}}}}}, "there is no arm smare; give one of none, smar"),
        ({"backbone": "gpt"}, "there is no backbone gpt; give one of emoji_tiny, smollm2_moe"),
        ({"arms": {"none": {}, "smar": {"like": ["other"]}}}, "there is no arm other; give one of none, smar"),
        (
            {"main": {"runs": {"small": {"smar": 1}}, "chosen": {"small": {"smar": {"lr": 0.1}}}}},
            r"smar of small needs the value of smar-coeff that the tuning chose for smar; write it into "
            r"main\.chosen\.small\.smar\.",
        ),
    ],
)
def test_an_invalid_grid_is_accepted(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, **changes)


def test_a_result_survives_a_change_of_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    first, *_ = (before := read(tmp_path)).runs()
    key = before.key(first)
    assert read(tmp_path).key(first) == key
    assert read(tmp_path, stages={"stage2": {"train-iters": 3}}).key(first) != key
    assert read(tmp_path, data={"scenes": {"seed": 2}}).key(first) != key
    assert read(tmp_path, models={"large": {"num-experts": 4}, "small": {}}).key(first) != key


def test_a_chosen_value_reaches_another_model_or_arm_or_the_tuning(tmp_path: Path) -> None:
    arms = {
        "none": {"modality-routing": "none"},
        "smar": {"modality-routing": "smar", "smar-coeff": 0.01},
        "low": {"modality-routing": "smar", "smar-coeff": 0.01, "smar-d-min": 0.1, "like": ["smar"]},
    }
    models = ("large", "small")
    main = {
        "runs": {model: dict.fromkeys(arms, 1) for model in models},
        "chosen": {"small": {"smar": {"smar-coeff": 1, "lr": 0.1}}, "large": {"smar": {"smar-coeff": 0.1, "lr": 0.1}}},
    }
    found = read(tmp_path, arms=arms, main=main)
    coefficients = {run.name: run.flags.get("smar-coeff") for run in found.runs()}
    assert coefficients["main/small/smar/1"] == coefficients["main/small/low/1"] == 1
    assert coefficients["main/large/smar/1"] == coefficients["main/large/low/1"] == 0.1
    assert coefficients["main/small/none/1"] is None and coefficients["tuning/large/smar__lr_0.1/101"] == 0.01
    assert all("like" not in run.flags for run in found.runs())


@pytest.mark.parametrize("file", grid.PLACES["grid"])
def test_a_committed_grid_has_arms_or_models_that_nothing_runs(file: str) -> None:
    committed = grid.read_grid(ROOT / file)
    used = {run.arm.partition("__")[0] for run in committed.runs()}
    assert committed.main["runs"] == {} or set(committed.arms) == used


def test_stages_are_trained_again_because_a_path_is_written_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parser = argparse.ArgumentParser()
    grid.add_places(parser, "output")
    for words in ([], ["--output", "runs/study"], ["--output", str(ROOT / "runs/study")]):
        grid.set_places(options := parser.parse_args(words))
        assert options.output == Path("runs/study")
    grid.set_places(options := parser.parse_args(["--output", "/elsewhere", "--smollm2"]))
    assert options.output == Path("/elsewhere")


# ---- splits and order


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.text(max_size=3)), max_size=20))
def test_a_document_is_in_both_splits(found: list[tuple[int, str]]) -> None:
    records = [{"document": f"{number:016x}", "text": text} for number, text in found]
    validation, test = study_data.split_texts(records).values()
    assert not {r["document"] for r in validation} & {r["document"] for r in test}
    assert len(validation) + len(test) == len(records)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=2), max_size=20))
def test_a_picture_is_in_both_splits(images: list[list[str]]) -> None:
    validation, test = study_data.split_questions([{"image": each} for each in images]).values()
    sides = [{picture for item in side for picture in item["image"]} for side in (validation, test)]
    assert not sides[0] & sides[1]
    assert len(validation) + len(test) >= sum(len(set(each)) == 1 for each in images)


@given(st.sets(st.tuples(st.integers(1, 4), st.sampled_from("abc"))), st.integers(1, 3))
def test_a_run_starts_before_the_stages_that_it_needs(wanted: set[tuple[int, str]], processes: int) -> None:
    todo = pool.ordered([grid.Run("main", "large", arm, seed, {}) for seed, arm in sorted(wanted)])
    done, running, finished = set(), [], []
    while todo or running:
        while len(running) < processes and (item := pool.ready(todo, done)) is not None:
            assert not isinstance(item, grid.Run) or item.base in done
            running.append(item)
        item = running.pop(0)  # there is always one: nothing waits for ever
        if isinstance(item, grid.Run):
            finished.append((item.seed, item.arm))
        else:
            done.add(item)
    assert sorted(finished) == sorted(wanted)


class FailingStage(backbones.EmojiTiny):
    """A model whose stage 1 fails for one seed."""

    def make(self, base: grid.Base) -> Path:
        if base[1] == 2:
            raise StepError("stage1 failed")
        return Path("nowhere")


class Failing(runs.Study):
    """A study whose runs take no time, and one of them fails."""

    def _measure(self, run: grid.Run, trained: Path, output: Path) -> dict:
        return {}

    def _after(self, run: grid.Run, folder: Path, start: Path) -> dict:
        folder.mkdir(parents=True, exist_ok=True)
        if run.arm == "smar" and run.seed == 1:
            raise StepError("stage2 failed")
        return {}


class Broken(Failing):
    """A study on a machine whose device is lost."""

    def _after(self, run: grid.Run, folder: Path, start: Path) -> dict:
        raise StepError("no device")


def test_a_failure_ends_other_runs_or_that_of_a_shared_stage_counts_as_a_failure_of_the_arms(tmp_path: Path) -> None:
    settings = read(tmp_path, main={"runs": {"large": {"none": 3, "smar": 3}}}, tuning={"seeds": [101], "runs": {}})
    study = Failing(FailingStage(settings, None, tmp_path / "work"), tmp_path / "results", {"code": "abc"})
    assert pool.run_here(study, settings.runs(), 2, 1, False) == 3
    found = {run.name: (study.result(run) or {"failed": "missing"}).get("failed") for run in settings.runs()}
    assert found == {
        **{f"main/large/{arm}/{seed}": None for arm in ("none", "smar") for seed in (1, 3)},
        **{f"main/large/{arm}/2": "missing" for arm in ("none", "smar")},
        "main/large/smar/1": "stage2 failed",
    }


def test_a_machine_that_fails_leaves_a_failure_of_every_arm(tmp_path: Path) -> None:
    settings = read(tmp_path, main={"runs": {"large": {"none": 3, "smar": 3}}}, tuning={"seeds": [101], "runs": {}})
    study = Broken(FailingStage(settings, None, tmp_path / "work"), tmp_path / "results", {"code": "abc"})
    assert pool.run_here(study, settings.runs(), 1, 1, False) == 5  # two without a result, since stage 1 failed
    found = sorted(str(file.relative_to(tmp_path / "results")) for file in (tmp_path / "results").rglob("*.json"))
    assert found == ["main/large/none/1.json", "main/large/none/3.json", "main/large/smar/1.json"]


def test_runs_keep_their_results_when_what_they_started_from_is_trained_again(tmp_path: Path) -> None:
    settings = read(tmp_path, main={"runs": {"large": {"none": 2}}}, tuning={"seeds": [101], "runs": {}})
    one, two = settings.runs()
    study = Failing(FailingStage(settings, None, tmp_path / "work"), tmp_path / "results", {"code": "abc"})
    for run in (one, two):
        content = {"key": settings.key(run), "before": {"text_perplexity": 1.23457}, "after": {}}
        runs.write_json(tmp_path / "results" / f"{run.name}.json", content)
    assert study.result(one) and study.result(two)  # on a machine that has no checkpoints
    for seed, perplexity in ((1, 1.2345678), (2, 1.2345478)):
        measured = tmp_path / "work" / "large" / f"seed-{seed}" / "stage1" / "measured_main_abc.json"
        runs.write_json(measured, {"text_perplexity": perplexity})
    assert study.result(one) and study.result(two) is None


def test_a_failure_replaces_a_success_or_is_forgotten_when_the_run_is_done_again(tmp_path: Path) -> None:
    settings = read(tmp_path, main={"runs": {"large": {"smar": 1}}}, tuning={"seeds": [101], "runs": {}})
    (only,) = settings.runs()
    backbone = FailingStage(settings, None, tmp_path / "work")
    failing = Failing(backbone, tmp_path / "results", {"code": "abc"})
    assert failing.run(only) == (failing.result(only), True)
    assert failing.run(only) == (failing.result(only), False)
    assert failing.result(only)["failed"] == "stage2 failed"
    working = Failing(backbone, tmp_path / "results", {"code": "abc"})
    object.__setattr__(working, "_after", lambda run, folder, start: {})
    assert working.run(only, retry=True)[0]["earlier_failures"] == ["stage2 failed"]
    assert "failed" not in failing.run(only, retry=True)[0]


def test_a_program_on_a_gpu_is_a_fork_or_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study's own process has imported torch and hidden the GPUs, and CUDA does not survive a fork."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nprint(os.getppid(), os.environ['MEGATRON_SMAR_DEVICE'], os.environ['OMP_NUM_THREADS'],"
        " os.environ['CUDA_VISIBLE_DEVICES'], 'torch' in sys.modules)\nsys.exit(len(sys.argv) - 1)"
    )
    monkeypatch.setattr(environment, "_visible", ["0,1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MEGATRON_SMAR_DEVICE", "cuda")
    programs.run_alone([str(program)], log := tmp_path / "logs" / "program.log")
    assert log.read_text() == f"{os.getpid()} cuda 1 0,1 False\n"
    with pytest.raises(StepError, match=f"^program failed; its output is in {log}"):
        programs.run_alone([str(program), "more"], log)
