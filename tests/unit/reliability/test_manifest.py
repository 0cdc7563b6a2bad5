# SPDX-License-Identifier: Apache-2.0
"""A manifest notices every change of a checkpoint's files, however they were written and whoever looks."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.reliability import manifest
from megatron_smar.reliability.manifest import LOADER, NAME, HashingFile, Manifest, Places, collect, sums_of

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK", BLOCK)


def write(path: Path, parts: list[bytes]) -> None:
    with HashingFile(path, []) as file:
        for part in parts:
            assert file.write(part) == len(part)
        assert file.tell() == sum(map(len, parts))


def make(folder: Path) -> Places:
    """Makes a checkpoint of two files written with hashes and one without, and a loader's state."""
    places = Places(folder / "iter_0000002", folder / "dataloader" / "iter_0000002")
    places.loader.mkdir(parents=True)
    places.checkpoint.mkdir()
    write(places.checkpoint / "__0_0.distcp", [bytes(range(250)), b"x" * 37])
    write(places.checkpoint / "__1_0.distcp", [b"y" * BLOCK])
    (places.checkpoint / ".metadata").write_bytes(b"contents")
    (places.loader / "state.pt").write_bytes(b"position")
    collect(places).write(places.checkpoint)
    return places


def problems(places: Places, how="full", share=0, shares=1) -> list[str]:
    found = Manifest.read(places.checkpoint)
    return [*found.size_problems(places), *found.block_problems(places, how, share, shares)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=3 * BLOCK), max_size=5))
def test_hashes_made_while_writing_are_those_of_the_file(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("file") / "a"
    old, manifest.BLOCK = manifest.BLOCK, BLOCK  # hypothesis runs all examples in one call of the fixture
    try:
        write(path, parts)
        written = collect(Places(path.parent)).files["a"]
        assert path.read_bytes() == b"".join(parts) and written == sums_of(path)
        assert sorted(file.name for file in path.parent.iterdir()) == ["a"]
    finally:
        manifest.BLOCK = old


def test_a_complete_checkpoint_has_no_problem_and_lists_its_files(tmp_path):
    places = make(tmp_path)
    assert problems(places) == []
    listed = Manifest.read(places.checkpoint).files
    assert sorted(listed) == [".metadata", "__0_0.distcp", "__1_0.distcp", LOADER + "state.pt"]
    assert Manifest.read(places.checkpoint).size == 250 + 37 + BLOCK + 8 + 8


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 286), st.integers(0, 7), st.integers(1, 5))
def test_a_flipped_bit_is_found_by_exactly_one_of_the_ranks_that_share_the_work(tmp_path_factory, byte, bit, shares):
    old, manifest.BLOCK = manifest.BLOCK, BLOCK
    try:
        places = make(tmp_path_factory.mktemp("checkpoint"))
        path = places.checkpoint / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        made = Manifest.read(places.checkpoint)
        found = [problem for share in range(shares) for problem in made.block_problems(places, "full", share, shares)]
        begin = byte // BLOCK * BLOCK
        assert found == [f"__0_0.distcp differs from its checksum in bytes {begin} to {begin + BLOCK}"]
    finally:
        manifest.BLOCK = old


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("__0_0.distcp", lambda path: os.truncate(path, 100), "__0_0.distcp has 100 of 287 bytes"),
        ("__1_0.distcp", lambda path: path.open("ab").write(b"z"), "__1_0.distcp has 65 instead of 64 bytes"),
        (".metadata", lambda path: path.unlink(), ".metadata is missing"),
    ],
)
def test_files_of_another_size_are_named_without_being_read(tmp_path, name, damage, said):
    places = make(tmp_path)
    damage(places.checkpoint / name)
    assert list(Manifest.read(places.checkpoint).size_problems(places)) == [said]


def test_the_loaders_state_belongs_to_the_checkpoint_unless_it_is_not_needed(tmp_path):
    places = make(tmp_path)
    shutil.rmtree(places.loader)
    assert problems(places) == [
        f"{LOADER}state.pt is missing",
        f"{LOADER}state.pt cannot be read (No such file or directory)",
    ]
    assert problems(Places(places.checkpoint)) == []


def test_a_sample_contains_the_ends_of_each_file_and_few_other_blocks(tmp_path):
    places = Places(tmp_path)
    write(tmp_path / "large", [b"x" * BLOCK * 1000])
    collect(places).write(tmp_path)
    found = Manifest.read(tmp_path)
    sample = [index for _, index in found._chosen("sampled")]
    assert sample[0] == 0 and sample[-1] == 999 and 30 < len(sample) < 120
    assert list(found._chosen("sampled")) == list(found._chosen("sampled")) and not list(found._chosen("none"))
    content = bytearray((tmp_path / "large").read_bytes())
    content[-1] ^= 1
    (tmp_path / "large").write_bytes(content)
    assert len(problems(places, "sampled")) == 1 and problems(places, "none") == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", None])
def test_a_damaged_manifest_is_no_manifest_and_not_taken_for_a_missing_one(tmp_path, damage):
    places = make(tmp_path)
    path = places.checkpoint / NAME
    path.write_bytes(path.read_bytes().replace(b"287", b"286") if damage is None else damage)
    with pytest.raises(ValueError, match=r"manifest\.json (cannot be read|does not have its own checksum)"):
        Manifest.read(places.checkpoint)
    path.unlink()
    assert Manifest.read(places.checkpoint) is None


def test_an_error_while_writing_is_kept_with_its_reason_and_leaves_no_hashes(tmp_path):
    errors: list[str] = []
    with pytest.raises(OSError), HashingFile("/dev/full", errors) as file:
        file.write(b"x" * 10_000)
        file.flush()
    assert errors[0] == "full: No space left on device"
    assert not Path("/dev/full.sums").exists()
