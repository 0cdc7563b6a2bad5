# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: what is written is what the library and transformers read, and the other way round."""

import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_smar.checkpoint.safetensors_io import DTYPES, INDEX, read_folder, write_folder


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Tensors of any type and shape, scalars and empty ones too."""
    shapes = st.lists(st.integers(0, 4), max_size=3)
    names = st.lists(st.text("abé.0", min_size=1, max_size=6), unique=True, min_size=1, max_size=5)
    found = {}
    for number, name in enumerate(draw(names)):
        generator = torch.Generator().manual_seed(number)
        values = torch.rand(draw(shapes), generator=generator) * 100
        found[name] = values.to(draw(st.sampled_from(list(DTYPES))))
    return found


def write(folder, found, max_shard_size="5GB"):
    """Writes tensors; the bytes of which progress was told."""
    told = []
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    write_folder(folder, layout, found.__getitem__, told.append, max_shard_size)
    return sum(told)


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(["5GB", "0.1KB"]))
def test_the_library_reads_what_was_written(tmp_path_factory, found, max_shard_size):
    folder = tmp_path_factory.mktemp("written")
    assert write(folder, found, max_shard_size) == sum(tensor.nbytes for tensor in found.values())
    files = sorted(folder.glob("*.safetensors"))
    loaded = {name: (tensor, file.name) for file in files for name, tensor in load_file(file).items()}
    assert loaded.keys() == found.keys()
    for name, (tensor, _) in loaded.items():
        assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
    if len(files) > 1:
        assert json.loads((folder / INDEX).read_text())["weight_map"] == {
            name: file for name, (_, file) in loaded.items()
        }
    for name, stored in read_folder(folder).items():
        assert (stored.shape, stored.dtype) == (tuple(found[name].shape), found[name].dtype)
        assert torch.equal(stored.read(), found[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5))
def test_any_rows_of_a_tensor_are_read(tmp_path_factory, start, length):
    folder, whole = tmp_path_factory.mktemp("rows"), torch.arange(20).view(10, 2)
    save_file({"w": whole}, folder / "model.safetensors")
    assert torch.equal(read_folder(folder)["w"].read(start, length), whole[start : start + length])


def test_no_tensor_is_kept_once_it_is_written(tmp_path):
    alive: list[weakref.ref] = []

    def read(name):
        assert sum(reference() is not None for reference in alive) <= 1, (
            "the one before is still held, and so are others"
        )
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write_folder(tmp_path, {str(n): ((1000,), torch.float32) for n in range(10)}, read, lambda _: None)


def test_a_single_file_or_the_index_decides_and_not_what_else_lies_there(tmp_path):
    for name in ("model", "consolidated"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert list(read_folder(tmp_path)) == ["model"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"consolidated": "consolidated.safetensors"}}))
    assert list(read_folder(tmp_path)) == ["consolidated"]


def break_file(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


BROKEN = {
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "as .*safetensors, but it has",
    ),
    "cut off": (break_file, "model.safetensors is no whole safetensors file .*fetch it again"),
    "no index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is no index of safetensors files .*fetch it again"),
    "index without names": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} is no index of safetensors files"),
    "index of a missing file": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}})),
        f"{INDEX} names gone.safetensors, missing beside it",
    ),
    "a type of quantised weights": (
        lambda f: save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, f / "model.safetensors"),
        "holds tensors of the type 'F8_E4M3'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_read_is_named_with_the_mend(tmp_path, case):
    damage, message = BROKEN[case]
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        read_folder(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)
