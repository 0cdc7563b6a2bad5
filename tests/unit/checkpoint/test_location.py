# SPDX-License-Identifier: Apache-2.0
"""What a folder holds for --load and --save: a checkpoint, nothing, or something that must be refused."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_smar.checkpoint.location import locate, same_place

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Returns a copy of a run's folder with steps 1 and 2, which a test may change."""
    return Path(shutil.copytree(trained["plain"], tmp_path / "run"))


def interrupt(checkpoint: Path) -> None:
    """Reduces a checkpoint to what is left if the run is killed while the weights are written."""
    for name in (".metadata", "metadata.json"):
        (checkpoint / name).unlink()


def test_the_checkpoint_that_the_tracker_names_is_found_by_any_spelling(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    for path in (str(run), f"{run}/", f"{run}//../run/.", str(tmp_path / "link")):
        found = locate("--load", path)
        assert found.checkpoint.name == "iter_0000002" and found.step == 2
        assert same_place(path, str(run))
    assert locate("--load", os.path.relpath(run)).step == 2
    assert not same_place(str(run), str(tmp_path)) and not same_place(None, str(run)) and not same_place(None, None)


def test_a_step_can_be_chosen_and_later_steps_are_listed(run):
    found = locate("--load", str(run), 1)
    assert found.step == 1 and found.newer == ("iter_0000002",)


def test_an_imported_model_is_found_and_has_no_steps(imported):
    found = locate("--load", str(imported))
    assert found.is_release and found.step == 0 and found.newer == ()
    with pytest.raises(ValueError, match=r"--ckpt-step 2: .* holds no steps but a converted model"):
        locate("--load", str(imported), 2)  # Megatron would load the release silently


def test_half_written_checkpoints_are_ignored_and_listed(run):
    (run / TRACKER).unlink()
    shutil.rmtree(run / "iter_0000001")
    interrupt(run / "iter_0000002")
    (run / "iter_0000003").mkdir()
    found = locate("--load", str(run))
    assert found.checkpoint is None and found.half_written == ("iter_0000002", "iter_0000003")


def test_a_half_written_checkpoint_after_a_complete_one_is_listed_too(run):
    (run / TRACKER).write_text("1\n")
    interrupt(run / "iter_0000002")
    found = locate("--load", str(run))
    assert found.step == 1 and found.half_written == ("iter_0000002",) and found.newer == ()


@pytest.mark.parametrize("place", ["nowhere", "empty", "with other things"])
def test_a_folder_without_checkpoints_has_none_to_load(tmp_path, place):
    folder = tmp_path / place
    if place != "nowhere":
        folder.mkdir()
    if place == "with other things":
        (folder / "dataloader" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
        (folder / "tensorboard").mkdir()
    assert locate("--load", str(folder)).checkpoint is None


def break_it(run: Path, how: str) -> Path:
    """Damages a run's folder in the named way, and returns the path to load."""
    latest, tracker = run / "iter_0000002", run / TRACKER
    contents = {"empty tracker": b"", "blank tracker": b" \n", "garbage": b"iter_0000002", "bytes": b"\xff\xfe\x00"}
    contents |= {"negative": b"-2", "another step": b"7\n"}
    if how in contents:
        tracker.write_bytes(contents[how])
    elif how == "no tracker":
        tracker.unlink()
    elif how == "a folder for a tracker":
        tracker.unlink()
        tracker.mkdir()
    elif how == "half-written":
        interrupt(latest)
    elif how == "missing":
        shutil.rmtree(latest)
    elif how == "truncated":
        file = next(latest.glob("*.distcp"))
        os.truncate(file, file.stat().st_size // 2)
    elif how == "a file gone":
        next(latest.glob("*.distcp")).unlink()
    elif how == "contents damaged":
        (latest / ".metadata").write_bytes((latest / ".metadata").read_bytes()[:100])
    elif how == "another format":
        shutil.rmtree(latest)
        (latest / "mp_rank_00").mkdir(parents=True)
    elif how == "another format without a tracker":
        shutil.rmtree(run)
        (latest / "mp_rank_00").mkdir(parents=True)
    elif how == "the checkpoint itself":
        return latest
    elif how == "the checkpoint itself, empty":
        shutil.rmtree(latest)
        latest.mkdir()
        return latest
    elif how == "a file":
        return tracker
    elif how == "a dangling link":
        run.with_name("link").symlink_to(run / "gone")
        return run.with_name("link")
    return run


REFUSED = {
    "no tracker": ["holds iter_0000001, iter_0000002 but no latest_checkpointed", "echo 2 > "],
    "empty tracker": ["names no step but ''", "a complete checkpoint beside it: 1, 2"],
    "blank tracker": ["names no step but ''"],
    "garbage": ["names no step but 'iter_0000002'"],
    "bytes": [f"{TRACKER} cannot be read"],
    "negative": ["names no step but '-2'"],
    "a folder for a tracker": [f"{TRACKER} cannot be read"],
    "another step": ["has no iter_0000007, which its latest_", "iter_0000001, iter_0000002; write 2 into"],
    "missing": ["has no iter_0000002", "complete ones there: iter_0000001; write 1 into"],
    "half-written": ["has no .metadata: it is half-written", "write 1 into"],
    "truncated": ["is damaged: __0_0.distcp has", "write 1 into"],
    "a file gone": ["is damaged: __0_0.distcp is missing", "write 1 into"],
    "contents damaged": [".metadata cannot be read", "write 1 into"],
    "another format": ["is in another format than torch_dist"],
    "another format without a tracker": ["is in another format than torch_dist"],
    "the checkpoint itself": ["one checkpoint's folder; give the one around it", "with --ckpt-step 2"],
    "the checkpoint itself, empty": ["one checkpoint's folder; give the one around it"],
    "a file": ["is a file; give a folder"],
    "a dangling link": ["is a link to", "which does not exist"],
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_not_ignored(run, how):
    path = break_it(run, how)
    with pytest.raises(ValueError) as refusal:
        locate("--load", str(path))
    for part in [*REFUSED[how], str(path)]:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "said"), [("", "is empty"), (" ", "is empty"), ("s3://bucket/run", "on a file system")]
)
def test_a_path_that_is_not_a_folders_is_refused(path, said):
    with pytest.raises(ValueError, match=said):
        locate("--load", path)


@pytest.mark.parametrize(
    ("step", "said"), [(7, "has no iter_0000007, which --ckpt-step 7 names"), (-1, "count from 1")]
)
def test_a_step_without_a_checkpoint_is_refused(run, step, said):
    with pytest.raises(ValueError, match=said):
        locate("--load", str(run), step)


FALLS_BACK = ["missing", "half-written", "truncated", "a file gone", "contents damaged"]


@pytest.mark.parametrize("how", FALLS_BACK)
def test_a_run_that_resumes_takes_the_checkpoint_before_a_damaged_one_and_says_why(run, how):
    found = locate("--save", str(break_it(run, how)), fall_back=True)
    assert found.step == 1 and len(found.rejected) == 1 and "iter_0000002" in found.rejected[0]


def test_a_run_without_an_undamaged_checkpoint_is_refused_not_started_again(run):
    for checkpoint in run.glob("iter_*"):
        interrupt(checkpoint)
    with pytest.raises(ValueError, match="half-written; complete ones there: none"):
        locate("--save", str(run), fall_back=True)


def test_a_chosen_step_is_never_replaced_by_another(run):
    break_it(run, "truncated")
    with pytest.raises(ValueError, match="is damaged"):
        locate("--load", str(run), 2, fall_back=True)
