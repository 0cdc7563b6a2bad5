# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: the library and transformers read what is written here, and the other way round."""

import json
import shutil
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_smar.checkpoint.safetensors_io import DTYPES, INDEX, read_folder, write_folder


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draws tensors of any type and shape, including scalars and empty tensors."""
    shapes = st.lists(st.integers(0, 4), max_size=3)
    names = st.lists(st.text("abé.0", min_size=1, max_size=6), unique=True, min_size=1, max_size=5)
    found = {}
    for number, name in enumerate(draw(names)):
        generator = torch.Generator().manual_seed(number)
        values = torch.rand(draw(shapes), generator=generator) * 100
        found[name] = values.to(draw(st.sampled_from(list(DTYPES))))
    return found


def write(folder, found, max_shard_size="5GB"):
    """Writes tensors; returns the number of bytes reported to `progress`."""
    reported = []
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    write_folder(folder, layout, found.__getitem__, reported.append, max_shard_size)
    return sum(reported)


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
    folder, tensor = tmp_path_factory.mktemp("rows"), torch.arange(20).view(10, 2)
    save_file({"w": tensor}, folder / "model.safetensors")
    assert torch.equal(read_folder(folder)["w"].read(start, length), tensor[start : start + length])


def test_no_tensor_is_kept_once_it_is_written(tmp_path):
    alive: list[weakref.ref] = []

    def read(name):
        assert sum(reference() is not None for reference in alive) <= 1, (
            "tensors before the last one are still held in memory"
        )
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write_folder(tmp_path, {str(n): ((1000,), torch.float32) for n in range(10)}, read, lambda _: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Saves two models of one shape, as one file (`one`, `two`) and as shards with an index (`one_shards`, ...)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for name in ("one", "two"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False))
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}_shards", max_shard_size="6KB")
    return root


def put(folder, origin, pattern):
    """Copies the files of one name pattern into a folder."""
    found = list(origin.glob(pattern))
    assert found
    for file in found:
        shutil.copyfile(file, folder / file.name)


def name_the_file(folder, models):
    put(folder, models / "one", "model.safetensors")
    shutil.copyfile(models / "two" / "model.safetensors", folder / "other.safetensors")
    content = json.loads((models / "one" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"transformers_weights": "other.safetensors"}))


SHARDS, WITH_INDEX = "model-*.safetensors", "model*"
BOTH = {
    "new file next to an old index": lambda f, m: [
        put(f, m / "two_shards", WITH_INDEX),
        put(f, m / "one", "model.safetensors"),
    ],
    "full file, index without its shards": lambda f, m: [
        put(f, m / "two_shards", INDEX),
        put(f, m / "one", "model.s*"),
    ],
    "pickles next to it": lambda f, m: [
        put(f, m / "one_shards", WITH_INDEX),
        (f / "pytorch_model.bin").write_bytes(b"no"),
    ],
    "another variant": lambda f, m: [
        put(f, m / "one", "model.safetensors"),
        shutil.copyfile(m / "two" / "model.safetensors", f / "model.fp16.safetensors"),
    ],
    "an index of another variant": lambda f, m: [
        put(f, m / "one_shards", WITH_INDEX),
        (f / "model.fp16.safetensors.index.json").write_text("{}"),
    ],
    "shards that the index does not name": lambda f, m: [
        put(f, m / "one_shards", WITH_INDEX),
        shutil.copyfile(m / "two" / "model.safetensors", f / "model-00001-of-00001.safetensors"),
    ],
    "consolidated weights next to it": lambda f, m: [
        put(f, m / "one_shards", WITH_INDEX),
        shutil.copyfile(m / "two" / "model.safetensors", f / "consolidated.safetensors"),
    ],
    "a file that config.json names": name_the_file,
}


@pytest.mark.parametrize("case", BOTH)
def test_the_same_weight_files_are_read_as_by_transformers(models, tmp_path, case, capsys):
    from transformers import AutoModelForCausalLM

    put(tmp_path, models / "one", "config.json")
    BOTH[case](tmp_path, models)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    found = read_folder(tmp_path)
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        assert torch.equal(stored.read(), expected[name]), name
    spare = {file.name for file in tmp_path.glob("*.safetensors")} - {stored.file.name for stored in found.values()}
    said = capsys.readouterr().out
    assert all(name in said for name in spare), "files that are left out are not named"


def test_safetensors_of_another_name_are_read_if_they_are_one_models(models, tmp_path):
    shutil.copyfile(models / "one" / "model.safetensors", tmp_path / "consolidated.safetensors")
    assert read_folder(tmp_path).keys() == load_file(tmp_path / "consolidated.safetensors").keys()
    (tmp_path / "consolidated.safetensors").unlink()
    put(tmp_path, models / "one_shards", SHARDS)
    assert read_folder(tmp_path).keys() == load_file(models / "one" / "model.safetensors").keys()


def index(folder, weight_map):
    """Makes two files with one tensor each, and an index."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"v": torch.zeros(1)}, folder / "b.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def break_file(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


BROKEN = {
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "as .*safetensors, but it has",
    ),
    "truncated": (break_file, "model.safetensors is not a complete safetensors file .*fetch it again"),
    "no index": (lambda f: [index(f, {}), (f / INDEX).write_text("{")], f"{INDEX} is not an index of .*fetch it again"),
    "index without names": (
        lambda f: [index(f, {}), (f / INDEX).write_text("{}")],
        f"{INDEX} is not an index of safetensors files",
    ),
    "empty index": (lambda f: index(f, {}), f"{INDEX} is not an index of safetensors files .it names no file"),
    "index of a missing file": (
        lambda f: index(f, {"w": "c.safetensors"}),
        f"{INDEX} names c.safetensors, which is missing",
    ),
    "index of a file elsewhere": (lambda f: index(f, {"w": "../a.safetensors"}), "a.safetensors, outside its folder"),
    "index of another file": (
        lambda f: index(f, {"w": "b.safetensors", "v": "b.safetensors"}),
        "says that w is in b.safetensors, which does not hold it",
    ),
    "index of a tensor in no file": (
        lambda f: index(f, {"w": "a.safetensors", "x": "b.safetensors"}),
        "says that x is in b.safetensors, which does not hold it",
    ),
    "one tensor in two shards": (
        lambda f: [
            index(f, {"w": "a.safetensors", "v": "b.safetensors"}),
            save_file({"v": torch.zeros(1), "w": torch.ones(1)}, f / "b.safetensors"),
        ],
        "w is in both a.safetensors and b.safetensors",
    ),
    "two files and no index": (
        lambda f: [index(f, {}), (f / INDEX).unlink()],
        f"neither model.safetensors nor {INDEX}, and a.safetensors, b.safetensors are not all the files",
    ),
    "a shard of two": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors are not all the files of one model",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter.*; merge it"),
    "a pickle that config.json names": (
        lambda f: (f / "config.json").write_text('{"transformers_weights": "pytorch_model.bin"}'),
        "names 'pytorch_model.bin' as transformers_weights; only safetensors",
    ),
    "a data type of quantized weights": (
        lambda f: save_file({"w": torch.zeros(2).to(torch.float8_e4m3fn)}, f / "model.safetensors"),
        "holds tensors of the type 'F8_E4M3'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_read_is_named_with_the_fix(tmp_path, case):
    damage, message = BROKEN[case]
    save_file({"w": torch.zeros(100)}, tmp_path / "model.safetensors")
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        read_folder(tmp_path)
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)
