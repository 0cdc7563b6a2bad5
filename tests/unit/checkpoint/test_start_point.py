# SPDX-License-Identifier: Apache-2.0
"""One command starts a run and, given again, resumes it; a start that would overwrite another run is refused."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_smar.checkpoint.fit import CheckpointMismatchError, resumed_state
from megatron_smar.checkpoint.start_point import apply_start, find_start, keep_origin

TRACKER = "latest_checkpointed_iteration.txt"
FLAGS = dict(load=None, save=None, pretrained_checkpoint=None, ckpt_step=None, finetune=False, skip_train=False)
FLAGS |= dict(exit_on_missing_checkpoint=False)


def given(**flags):
    return Namespace(**FLAGS | {name: str(v) if isinstance(v, Path) else v for name, v in flags.items()})


def start(**flags):
    return find_start(given(**flags))


@pytest.fixture
def runs(trained, tmp_path):
    """Returns a folder that holds a run of two steps, started with new weights (`first`)."""
    shutil.copytree(trained["plain"], tmp_path / "first")
    return tmp_path


def write_origin(folder: Path, origin, **changes) -> None:
    """Stores an origin in the latest checkpoint of a folder, as a run with that start does."""
    import torch

    from megatron_smar.checkpoint.metadata import COMMON_STATE, read_common_state, read_contents

    checkpoint = folder / "iter_0000002"
    contents = read_contents(checkpoint)
    state = read_common_state(checkpoint, contents)
    vars(state["args"]).update(changes | {"origin": origin, "load": None, "save": str(folder)})
    torch.save(state, checkpoint / "common.pt")  # takes precedence over the state in the weight files
    assert any(index.fqn.startswith(COMMON_STATE) for index in contents.storage_data)


def second_run(runs: Path, **flags) -> Path:
    """Returns the folder of a second run, which started from `first` and has saved checkpoints."""
    begin = start(load=runs / "first", save=runs / "second", **flags)
    shutil.copytree(runs / "first", runs / "second")
    write_origin(runs / "second", begin.origin)
    return runs / "second"


def resume(folder: Path, **flags):
    """Returns a run's arguments and start point for flags, found and checked as in the trainer."""
    args = given(**flags)
    point = find_start(args)
    saved = resumed_state(given(load=folder))["args"]
    state_flags = dict(
        load=point.load, finetune=point.finetune, ckpt_step=None if point.resumes_from_save else args.ckpt_step
    )
    own = {name: value for name, value in vars(args).items() if name in vars(saved) and name not in FLAGS}
    run = Namespace(**vars(saved) | vars(args) | own | state_flags)
    keep_origin(run, point, resumed_state(run))
    return run, point


def test_a_first_start_uses_the_start_that_the_flags_name(runs, imported):
    begin = start(load=runs / "first", save=runs / "second", finetune=True)
    assert (begin.load, begin.finetune, begin.resumes_from_save) == (str(runs / "first"), True, False)
    assert begin.origin["checkpoint"] == "iter_0000002" and begin.origin["finetune"]
    assert start(save=runs / "second").load is None
    assert start(load=imported, save=runs / "second").origin["finetune"], "a converted model has no run to resume"
    of_megatron = start(pretrained_checkpoint=runs / "first", load=runs / "second", save=runs / "second")
    assert (of_megatron.load, of_megatron.finetune, of_megatron.origin) == (begin.load, True, begin.origin)


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../second", "link"])
def test_the_same_command_again_resumes_from_save(runs, finetune, spelling):
    second = second_run(runs, finetune=finetune)
    (runs / "link").symlink_to(second)
    save = runs / "link" if spelling == "link" else spelling.format(second)
    args, point = resume(second, load=runs / "first", save=save, finetune=finetune)
    assert (point.load, point.finetune, point.resumes_from_save) == (str(save), False, True)
    assert args.origin["folder"] == str(runs / "first"), "the run's own checkpoints have lost its origin"
    assert "resumes there" in point.notes[0] and "step 2" in point.notes[0]


def test_a_run_with_new_weights_resumes_without_load_and_with_it(runs):
    for load in (None, runs / "first"):
        _, point = resume(runs / "first", load=load, save=runs / "first")
        assert point.load == str(runs / "first") and not point.finetune


def test_a_run_resumes_even_if_its_start_was_moved_or_deleted(runs):
    second = second_run(runs, finetune=True)
    (runs / "first").rename(runs / "moved")
    for load in ("first", "moved"):
        assert resume(second, load=runs / load, save=second, finetune=True)[1].resumes_from_save
    with pytest.raises(CheckpointMismatchError, match="holds another run: it started from"):
        resume(second, load=runs / "other", save=second, finetune=True)


def test_a_converted_model_and_its_run_share_a_folder(runs, imported):
    both = Path(shutil.copytree(imported, runs / "both"))
    begin = start(load=both, save=both, finetune=True)
    assert begin.load == str(both) and begin.origin["checkpoint"] == "release"
    shutil.copytree(runs / "first" / "iter_0000002", both / "iter_0000002")
    (both / TRACKER).write_text("2")
    write_origin(both, begin.origin)
    for finetune in (True, False):
        _, point = resume(both, load=both, save=both, finetune=finetune)
        assert point.load == str(both) and not point.finetune


def test_the_flags_of_the_first_start_do_not_apply_to_a_run_that_resumes(runs):
    first = ["--lr", "1", "--load", "a", "--finetune", "--no-load-optim", "--no-load-rng", "--ckpt-step=3"]
    second = second_run(runs, finetune=True)
    resumed = start(load=runs / "first", save=second, finetune=True)
    assert apply_start([*first, "--freeze", "vision"], resumed) == [
        *["--lr", "1", "--freeze", "vision", "--load", str(second)]
    ]
    begun = start(load=runs / "first", save=runs / "third", finetune=True)
    flags = ["--lr", "1", "--no-load-optim", "--no-load-rng", "--ckpt-step=3"]
    assert apply_start(first, begun) == [*flags, "--load", str(runs / "first"), "--finetune"]
    nothing = start(load=runs / "third", save=runs / "third")
    assert apply_start(["--load", "third", "--save", "third"], nothing) == ["--save", "third"]


ANOTHER = {
    "start": (dict(load="other"), "it started from"),
    "no start": (dict(load=None, finetune=False), "this one starts with new weights"),
    "way of starting": (dict(finetune=False), "it started with --finetune"),
    "model": (dict(hidden_size=48), "--hidden-size was 32, not 48"),
    "frozen parts": (dict(freeze=["vision", "language"]), "--freeze was vision, not vision language"),
    "strategy": (dict(modality_routing="none"), "--modality-routing was smar, not none"),
    "strength": (dict(smar_coeff=0.375), "--smar-coeff was "),
    "layers": (dict(smar_band_file_content={1: ((0.5, 1.0), None)}), "--smar-band-file-content was None, not "),
    "data": (dict(data_path=["shards/other"]), "--data-path was "),
    "template": (dict(conversation_template="vita"), "--conversation-template was mistral, not vita"),
    "seed": (dict(seed=99), "--seed was "),
}


@pytest.mark.parametrize("difference", ANOTHER)
def test_a_folder_with_another_run_is_refused_with_the_difference(runs, difference):
    flags, said = ANOTHER[difference]
    second = second_run(runs, finetune=True)
    shutil.copytree(runs / "first", runs / "other")
    contents = runs / "other" / "iter_0000002" / ".metadata"  # as if saved again with the same shapes
    contents.write_bytes(contents.read_bytes() + b"another")
    command = dict(load=runs / "first", save=second, finetune=True) | flags
    if flags.get("load"):
        command["load"] = runs / flags["load"]
    with pytest.raises(CheckpointMismatchError) as refusal:
        resume(second, **command)
    for part in (f"--save {second} holds another run: ", said, f"--load {second} without --finetune"):
        assert part in str(refusal.value)
    resume(second, **command | dict(load=second, finetune=False))


def test_a_start_that_was_saved_again_since_is_another_start(runs):
    second = second_run(runs, finetune=True)
    (runs / "first" / TRACKER).write_text("1")
    with pytest.raises(
        CheckpointMismatchError, match=r"iter_0000002, and this one .*iter_0000001, which was saved again"
    ):
        resume(second, load=runs / "first", save=second, finetune=True)


def test_going_back_to_an_earlier_step_is_printed(runs):
    point = start(load=runs / "first", save=runs / "first", ckpt_step=1)
    assert point.load == str(runs / "first")
    assert "goes back to this step" in point.notes[0] and "iter_0000002" in point.notes[0]
    assert not start(load=runs / "first", save=runs / "first", ckpt_step=2).notes


@pytest.mark.parametrize("load", [True, False])
def test_a_run_resumes_from_the_newest_undamaged_checkpoint_and_says_so(runs, load):
    folder = runs / "first"
    (folder / "iter_0000002" / ".metadata").unlink()
    point = start(load=folder if load else None, save=folder)
    assert point.step == 1 and point.load == str(folder)
    assert "iter_0000002 has no .metadata: it is half-written. The run resumes from step 1 instead" in point.notes[0]
    command = apply_start(["train.py", "--load", str(folder), "--save", str(folder)], point)
    assert command[command.index("--ckpt-step") + 1] == "1"


def test_half_written_checkpoints_in_save_are_named_and_the_run_starts(runs):
    for name in ("iter_0000001", "iter_0000002"):
        (runs / "first" / name / ".metadata").unlink()
    (runs / "first" / TRACKER).unlink()
    point = start(load=runs / "first", save=runs / "first")
    assert point.load is None
    assert point.notes == (
        f"--save {runs / 'first'}: iter_0000001, iter_0000002 are half-written and ignored.",
        f"--save {runs / 'first'} holds no checkpoint: the run starts at step 0, with new weights.",
    )
    with pytest.raises(ValueError, match="holds no checkpoint but iter_0000001, iter_0000002, which are half-written"):
        start(load=runs / "first", save=runs / "second")


REFUSED = {
    "load from a missing folder": (dict(load="nowhere"), ["--load", "does not exist", "random weights"]),
    "load from a missing folder, saved elsewhere": (dict(load="nowhere", save="second"), ["--load", "does not exist"]),
    "load from an empty folder": (dict(load="empty", save="second"), ["holds no checkpoint"]),
    "finetune from a missing folder": (dict(load="nowhere", finetune=True), ["--finetune starts from its weights"]),
    "finetune from the run's own empty folder": (
        dict(load="new", save="new", finetune=True),
        ["--finetune needs a checkpoint"],
    ),
    "missing, with a flag to exit": (
        dict(load="new", save="new", exit_on_missing_checkpoint=True),
        ["--exit-on-missing-"],
    ),
    "nothing to evaluate": (dict(skip_train=True, exit_on_missing_checkpoint=True), ["--load is missing"]),
    "finetune without load": (dict(finetune=True), ["--finetune", "--load, which is missing"]),
    "a step without load": (dict(ckpt_step=3), ["--ckpt-step 3", "--load, which is missing"]),
    "step zero": (dict(ckpt_step=0, load="first"), ["--ckpt-step is 0"]),
    "a new run in its own folder": (
        dict(load="first", save="first", finetune=True),
        ["--save", "it started with new weights, and this one starts from"],
    ),
    "an empty --load": (dict(load="", save="new"), ["--load is empty"]),
    "an empty --save": (dict(load="first", save=""), ["--save is empty"]),
    "a file to save in": (dict(save=f"first/{TRACKER}"), ["is a file"]),
    "below a file": (dict(save=f"first/{TRACKER}/new"), ["nothing can be written in"]),
    "a checkpoint to save in": (dict(save="first/iter_0000002"), ["one checkpoint's folder"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_an_impossible_start_is_refused_in_one_sentence(runs, mistake):
    flags, said = REFUSED[mistake]
    (runs / "empty").mkdir()
    flags = {k: runs / v if k in ("load", "save") and v else v for k, v in flags.items()}
    with pytest.raises(ValueError) as refusal:
        resume(runs / "first", **flags)
    for part in said:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_converted_model_in_save_is_not_overwritten(runs, imported):
    with pytest.raises(ValueError, match=r"--save .* holds a converted model"):
        start(load=runs / "first", save=imported)
    with pytest.raises(ValueError, match="or --load with this one"):
        start(save=imported)


def test_a_run_that_would_overwrite_an_unreadable_tracker_is_refused(runs):
    (runs / "first" / TRACKER).write_text("")
    for load in (runs / "first", None):
        with pytest.raises(ValueError, match="names no step but ''"):
            start(load=load, save=runs / "first")


def test_evaluation_loads_and_never_resumes(runs):
    second = second_run(runs, finetune=True)
    point = start(load=runs / "first", save=second, skip_train=True)
    assert point.load == str(runs / "first") and not point.resumes_from_save
