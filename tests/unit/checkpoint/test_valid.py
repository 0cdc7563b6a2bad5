# SPDX-License-Identifier: Apache-2.0
"""Before a checkpoint is loaded its files are verified, and a run that resumes takes an earlier one if it has to."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_smar.checkpoint.metadata import DamagedError
from megatron_smar.checkpoint.valid import take_valid_checkpoint, verify_content
from megatron_smar.reliability.manifest import Places, collect


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Returns a copy of a run's folder with steps 1 and 2 and their manifests."""
    folder = Path(shutil.copytree(trained["plain"], tmp_path / "run"))
    for checkpoint in folder.glob("iter_*"):
        collect(Places(checkpoint)).write(checkpoint)
    return folder


def arguments(run: Path, **flags) -> Namespace:
    common = dict(load=str(run), save=str(run), finetune=False, skip_train=False, ckpt_step=None)
    return Namespace(**common | dict(pretrained_checkpoint=None, load_dataloader_state=False) | flags)


def flip(checkpoint: Path) -> None:
    """Changes one bit in the middle of the largest file, which nothing else would notice."""
    path = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_undamaged_checkpoint_is_taken_as_it_is(run, capsys):
    args = arguments(run)
    take_valid_checkpoint(args, "full")
    assert args.ckpt_step is None and "is undamaged" in capsys.readouterr().out


def test_a_run_resumes_from_the_step_before_a_checkpoint_with_a_flipped_bit(run, capsys):
    flip(run / "iter_0000002")
    args = arguments(run)
    take_valid_checkpoint(args, "full")
    said = capsys.readouterr().out
    assert args.ckpt_step == 1 and "differs from its checksum" in said
    assert "The run resumes from iter_0000001 instead" in said


def test_no_checkpoint_is_taken_when_all_are_damaged_and_every_one_is_named(run):
    for checkpoint in run.glob("iter_*"):
        flip(checkpoint)
    with pytest.raises(DamagedError) as refusal:
        take_valid_checkpoint(arguments(run), "full")
    assert "iter_0000001 is damaged" in str(refusal.value) and "iter_0000002 is damaged" in str(refusal.value)
    assert "no earlier checkpoint there is undamaged" in str(refusal.value)


@pytest.mark.parametrize("flags", [dict(save=None), dict(skip_train=True), dict(finetune=True)])
def test_another_step_is_never_taken_for_a_checkpoint_that_the_user_chose(run, flags):
    flip(run / "iter_0000002")
    with pytest.raises(DamagedError, match=r"iter_0000002 is damaged: .*; give another --load"):
        take_valid_checkpoint(arguments(run, **flags), "full")


def test_sizes_are_compared_without_reading_and_none_trusts_everything(run):
    flip(run / "iter_0000002")
    assert verify_content(run / "iter_0000002", "none", None)[0] == []
    args = arguments(run)
    take_valid_checkpoint(args, "none")
    assert args.ckpt_step is None


def test_a_checkpoint_without_a_manifest_is_taken_and_said_to_have_none(run, capsys):
    (run / "iter_0000002" / "manifest.json").unlink()
    take_valid_checkpoint(arguments(run), "full")
    assert "has no manifest, so only the sizes" in capsys.readouterr().out


def test_a_missing_state_of_the_data_loader_makes_a_run_that_needs_it_resume_earlier(run):
    for step in (1, 2):
        state = run / "dataloader" / f"iter_{step:07d}" / "state.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.write_text("position")
        checkpoint = run / state.parent.name
        collect(Places(checkpoint, state.parent)).write(checkpoint)
    shutil.rmtree(run / "dataloader" / "iter_0000002")
    args = arguments(run, load_dataloader_state=True, loader_state_folder=None)
    take_valid_checkpoint(args, "full")
    assert args.ckpt_step == 1
