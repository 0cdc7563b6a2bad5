# SPDX-License-Identifier: Apache-2.0
"""Retention deletes what its flags say and never the last checkpoint that a run could resume from."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.reliability.manifest import Places, collect
from megatron_smar.reliability.retention import delete_old, superfluous


def make(folder: Path, step: int, manifest: bool = True) -> Path:
    checkpoint, loader = folder / f"iter_{step:07d}", folder / "dataloader" / f"iter_{step:07d}"
    checkpoint.mkdir(parents=True)
    loader.mkdir(parents=True)
    for path in (checkpoint / ".metadata", checkpoint / "metadata.json", loader / "state.pt"):
        path.write_text(str(step))
    if manifest:
        collect(Places(checkpoint, loader)).write(checkpoint)
    return checkpoint


def left(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def delete(folder: Path, newest: int, **flags: int) -> list[str]:
    return list(delete_old(folder, folder / "dataloader", newest, ReliabilityConfig(**flags)))


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 5), st.none() | st.integers(1, 10))
def test_the_newest_are_kept_and_the_milestones(steps, keep_last, keep_every):
    newest = max(steps)
    deleted = superfluous(sorted(steps), newest, ReliabilityConfig(keep_last=keep_last, keep_every=keep_every))
    kept = steps - set(deleted)
    assert newest in kept and set(sorted(steps)[-keep_last:]) <= kept
    assert all(step in kept for step in steps if keep_every and step % keep_every == 0)
    assert len(kept) == min(keep_last, len(steps)) or keep_every


def test_checkpoints_and_their_loader_states_are_deleted_together(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    assert delete(tmp_path, 8, keep_last=2, keep_every=4) == ["iter_0000002"]
    assert left(tmp_path) == left(tmp_path / "dataloader") == [4, 6, 8]


def test_steps_of_a_course_that_the_run_has_left_are_deleted(tmp_path):
    for step in (2, 4, 8):
        make(tmp_path, step)
    assert delete(tmp_path, 4, keep_last=2) == ["iter_0000008"]


@pytest.mark.parametrize("damaged", ["the newest", "the one before"])
def test_an_incomplete_checkpoint_does_not_count_as_kept(tmp_path, damaged):
    for step in (2, 4, 6):
        make(tmp_path, step)
    (tmp_path / f"iter_000000{6 if damaged == 'the newest' else 4}" / ".metadata").unlink()
    assert delete(tmp_path, 6, keep_last=2) == []
    assert left(tmp_path) == [2, 4, 6]


def test_checkpoints_without_a_manifest_count_and_links_stay(tmp_path):
    make(tmp_path, 2, manifest=False)
    elsewhere = make(tmp_path / "elsewhere", 4)
    (tmp_path / "iter_0000004").symlink_to(elsewhere)
    make(tmp_path, 6)
    assert delete(tmp_path, 6, keep_last=1) == ["iter_0000002"]
    assert left(tmp_path) == [4, 6] and elsewhere.is_dir()


@pytest.mark.parametrize("flags", [dict(keep_every=4), dict(keep_last=0), dict(keep_last=1, keep_every=0)])
def test_retention_that_would_keep_nothing_or_everything_is_refused(flags):
    with pytest.raises(ValueError, match=r"--keep-(last|every)"):
        ReliabilityConfig(**flags)
