# SPDX-License-Identifier: Apache-2.0
"""torch_dist checkpoints: any part of any tensor can be read, however it was sharded; no code in a file is run."""

import itertools
import os
import pickle
import shutil
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.checkpoint.metadata import DamagedError
from megatron_smar.checkpoint.torch_dist import SWEEP_BYTES, CheckpointReader, Shard, write_checkpoint
from tests.launch import load_weights


def split_axis(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Draws consecutive spans of an axis; mostly of single indices, as Megatron splits layers and experts."""
    places = set(range(size)) if draw(st.booleans()) else draw(st.sets(st.integers(0, size - 1)))
    edges = sorted({0, *places, size})
    return list(itertools.pairwise(edges))


@st.composite
def chunked(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[tuple[int, int]]], list[tuple[int, int]]]:
    """Draws a tensor, the grid of chunks in which it is written, and a region to read."""
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    region = [
        (start, draw(st.integers(start + 1, size))) for size in shape for start in [draw(st.integers(0, size - 1))]
    ]
    return tensor, [split_axis(draw, size) for size in shape], region


def shards_of(key: str, tensor: torch.Tensor, grid: list[list[tuple[int, int]]]) -> list[Shard]:
    """Returns a tensor's chunks."""
    shards = []
    for spans in itertools.product(*grid):
        part = tensor[tuple(slice(a, b) for a, b in spans)].clone()
        offsets, sizes = tuple(a for a, _ in spans), tuple(b - a for a, b in spans)
        shards.append(Shard(key, offsets, sizes, tuple(tensor.shape), tensor.dtype, lambda part=part: part))
    return shards


def write(folder: Path, shards: list[Shard]) -> int:
    """Writes a checkpoint; returns the number of bytes reported to `progress`."""
    reported: list[int] = []
    write_checkpoint(folder, shards, [], Namespace(num_layers=3), reported.append)
    return sum(reported)


@settings(max_examples=60, deadline=None)
@given(chunked())
def test_any_region_of_a_tensor_is_read_whatever_chunks_it_was_written_in(tmp_path_factory, case):
    tensor, grid, region = case
    folder = tmp_path_factory.mktemp("chunks")
    assert write(folder, shards_of("language_model.w", tensor, grid)) == tensor.nbytes
    offsets, sizes = tuple(a for a, _ in region), tuple(b - a for a, b in region)
    found = CheckpointReader(folder).read("language_model.w", offsets, sizes)
    assert torch.equal(found, tensor[tuple(slice(a, b) for a, b in region)])
    assert torch.equal(load_weights(folder / "release")["language_model.w"], tensor), "torch reads a different tensor"


def test_writing_holds_at_most_two_sweeps_of_tensors_in_memory(tmp_path):
    size = SWEEP_BYTES // 4
    alive: dict[int, weakref.ref] = {}

    def read(number: int) -> torch.Tensor:
        held = sum(size for reference in alive.values() if reference() is not None)
        assert held <= 2 * SWEEP_BYTES, f"{held} bytes of tensors written before are still held"
        tensor = torch.full((size,), number, dtype=torch.uint8)
        alive[number] = weakref.ref(tensor)
        return tensor

    shards = [Shard(f"w{n}", (0,), (size,), (size,), torch.uint8, lambda n=n: read(n)) for n in range(16)]
    assert write(tmp_path / "checkpoint", shards) == 16 * size
    assert len(list((tmp_path / "checkpoint" / "release").glob("*.distcp"))) > 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Writes a checkpoint of two tensors."""
    folder = tmp_path_factory.mktemp("complete") / "checkpoint"
    tensors = {"w": torch.arange(600.0).view(3, 200), "v": torch.ones(5)}
    grids = {"w": [[(0, 1), (1, 2), (2, 3)], [(0, 200)]], "v": [[(0, 5)]]}
    write(folder, [shard for key, tensor in tensors.items() for shard in shards_of(key, tensor, grids[key])])
    return folder


def test_a_chunk_missing_from_the_table_of_contents_is_an_error(checkpoint):
    reader = CheckpointReader(checkpoint)
    reader.tensors["w"].chunks.pop(1)
    with pytest.raises(ValueError, match="has lost a part of w; take another of its checkpoints"):
        reader.read("w", (0, 0), (3, 200))
    assert torch.equal(reader.read("w", (2, 10), (1, 5)), torch.arange(410.0, 415.0).view(1, 5))


def test_the_runs_arguments_are_read_with_the_weights(checkpoint):
    assert CheckpointReader(checkpoint).common_state["args"].num_layers == 3


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def overwrite(folder: Path) -> None:
    """Overwrites a tensor with zeros."""
    file, places = weights(folder), CheckpointReader(folder)._storage
    (place,) = (place for index, place in places.items() if index.fqn == "v")
    content = bytearray(file.read_bytes())
    content[place.offset : place.offset + place.length] = bytes(place.length)
    file.write_bytes(content)


def weights(folder: Path) -> Path:
    (file,) = (folder / "release").glob("*.distcp")
    return file


DAMAGES = {
    "truncated": (
        lambda f: os.truncate(weights(f), weights(f).stat().st_size // 2),
        r"release is damaged: .*distcp has \d+",
    ),
    "a file gone": (lambda f: weights(f).unlink(), r"is damaged: .*distcp is missing; take another"),
    "overwritten": (overwrite, r"distcp does not give v .*; the checkpoint is damaged"),
    "contents truncated": (lambda f: os.truncate(f / "release/.metadata", 50), r"\.metadata cannot be read"),
    "contents gone": (lambda f: (f / "release/.metadata").unlink(), "its saving was cut off"),
    "no release": (lambda f: shutil.rmtree(f / "release"), "has no release"),
    "no tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").unlink(),
        "has no latest_checkpointed_iteration",
    ),
    "another tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("x y"),
        "names no step but 'x y'",
    ),
    "no folder": (shutil.rmtree, "is not a folder"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_in_one_sentence(checkpoint, tmp_path, damage):
    inflict, message = DAMAGES[damage]
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    inflict(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        CheckpointReader(folder).read("v", (0,), (5,))
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_step_without_a_checkpoint_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"has no iter_0000007; there are: none"):
        CheckpointReader(checkpoint, 7)


def test_code_in_an_untrusted_file_is_never_run(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(DamagedError, match=r"asks for posix\.mkdir, which has no place there"):
        CheckpointReader(folder)
    reader = CheckpointReader(checkpoint)
    (place,) = {place.relative_path: place for index, place in reader._storage.items() if index.fqn == "v"}.values()
    evil = tmp_path / "evil.pt"
    torch.save(Malicious(tmp_path / "made"), evil)
    reader.folder, place.relative_path, place.offset, place.length = tmp_path, evil.name, 0, evil.stat().st_size
    with pytest.raises(DamagedError, match=r"evil\.pt does not give v"):
        reader.read("v", (0,), (5,))
    assert not (tmp_path / "made").exists()
