# SPDX-License-Identifier: Apache-2.0
"""Blend files and the files of a data folder: mistakes are reported in one sentence, code is never run."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

from megatron_smar.data import (
    DataConfig,
    DataError,
    EnergonIterator,
    build_train_loader,
    build_valid_loader,
    load_loader_state,
)
from megatron_smar.data.metadataset import check_sources

from .conftest import write_records

Make = Callable[..., DataConfig]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
HEAD = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, prepare_module: ModuleType) -> Path:
    """The sources `big` (80 training and 40 validation samples) and `small` (5 and 3)."""
    root = tmp_path_factory.mktemp("blend")
    for name, train, valid in (("big", 80, 40), ("small", 5, 3)):
        folder = root / f"{name}-records"
        records = (write_records(folder, train), write_records(folder, valid, "val"))
        prepare_module.prepare(
            root / name, [records[0]], [records[1]], image_root=folder / "images", samples_per_shard=20, progress=False
        )
    return root


def write(path: Path, content: Any) -> str:
    # Through JSON, because YAML would write an alias for an object that occurs twice.
    plain = content if isinstance(content, str) else yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)
    path.write_text(plain)
    return str(path)


def blend(path: Path, *sources: dict[str, Any], kind: str = "blend", **more: Any) -> str:
    split = {kind: list(sources)}
    return write(path, HEAD | {"splits": {"train": split, "val": split} | more})


def shares(iterators: list[EnergonIterator], batches: int) -> Counter[str]:
    counts = Counter(
        key.split("/")[0] for iterator in iterators for _ in range(batches) for key in next(iterator).__key__
    )
    for iterator in iterators:
        iterator.close()
    return counts


def train(config: DataConfig, tokenizer: Any, size: int) -> list[EnergonIterator]:
    loaders = [build_train_loader(config, tokenizer, rank, size, decode_images=False) for rank in range(size)]
    return [EnergonIterator(loader, config) for loader in loaders]


BIG, SMALL = {"path": "./big", "weight": 0.7}, {"path": "./small", "weight": 0.3}


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (5, 0), (1, 2)])
def test_a_small_source_keeps_its_share_on_any_number_of_workers(
    make_config: Make, tokenizer: Any, sources: Path, size: int, workers: int
) -> None:
    path = blend(sources / "share.yaml", BIG, SMALL)
    config = make_config(data_path=path, num_workers=workers, micro_batch_size=20, verify_images=False)
    counts = shares(train(config, tokenizer, size), 100 // size)
    assert abs(counts["small"] / counts.total() - 0.3) < 0.035, "2,000 samples: 3.4 standard deviations"


NESTED = {"path": "./inner.yaml", "weight": 1.0}


@pytest.mark.parametrize(
    "content",
    [
        {"blend": [BIG, SMALL]},
        {"blend": [NESTED, {"path": "./big", "weight": 2}]},
        {"blend_epochized": [{"path": "./big", "repetitions": 1}, {"path": "./small", "repetitions": 10}]},
        {"blend_epochized": [{"path": "./big"}, {"path": "./big", "repetitions": 0.05}]},
    ],
    ids=["blend", "nested", "repetitions", "part of a repetition"],
)
def test_a_source_too_small_for_all_workers_is_refused_by_name_on_every_rank(
    make_config: Make, tokenizer: Any, sources: Path, content: dict[str, Any]
) -> None:
    blend(sources / "inner.yaml", BIG, SMALL)
    config = make_config(data_path=write(sources / "tiny.yaml", HEAD | {"splits": {"train": content, "val": content}}))
    messages = set()
    for rank in range(8):
        with pytest.raises(DataError) as error:
            build_train_loader(config, tokenizer, rank, 8)
        messages.add(str(error.value))
    assert len(messages) == 1
    name, samples = ("big", 80) if "repetitions': 0.05" in str(content) else ("small", 5)
    assert f"/{name} has {samples} training samples" in messages.pop()
    with pytest.raises(DataError, match="validation samples"):
        build_valid_loader(config, tokenizer, 0, 8, num_batches=2)


def test_text_only_parts_too_small_for_all_workers_are_refused(
    make_config: Make, tokenizer: Any, sources: Path
) -> None:
    config = make_config(data_path=blend(sources / "parts.yaml", BIG, SMALL), text_only_ratio=0.1)
    with pytest.raises(DataError, match=r"small has \d text-only training samples for 4 workers"):
        build_train_loader(config, tokenizer, 0, 4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_short_validation_pass_has_the_blends_shares(
    make_config: Make, tokenizer: Any, sources: Path, size: int
) -> None:
    """energon would read one source after the other: 6 batches would all come from the first source."""
    config = make_config(data_path=blend(sources / "valid.yaml", BIG, SMALL), micro_batch_size=5)
    loaders = [build_valid_loader(config, tokenizer, rank, size, num_batches=2) for rank in range(size)]
    iterators = [EnergonIterator(loader, config, batches_per_pass=2) for loader in loaders]
    passes = [[next(iterator).__key__ for _ in range(2)] for _ in range(2) for iterator in iterators]
    assert passes[:size] == passes[size:], "each pass is the same"
    counts = Counter(key.split("/")[0] for batches in passes[:size] for keys in batches for key in keys)
    assert abs(counts["small"] - 0.3 * 10 * size) <= 1


def test_a_long_validation_pass_reads_every_sample(make_config: Make, tokenizer: Any, sources: Path) -> None:
    config = make_config(data_path=blend(sources / "valid.yaml", BIG, SMALL), micro_batch_size=1)
    loader = build_valid_loader(config, tokenizer, 0, 1, num_batches=1000)
    seen = Counter(key for batch in loader for key in batch.__key__)
    assert len(seen) == 43 and {count for key, count in seen.items() if key.startswith("big")} == {1}
    assert sum(count for key, count in seen.items() if key.startswith("small")) / seen.total() == pytest.approx(
        0.3, abs=0.02
    )


@pytest.mark.parametrize("kind", ["blend", "blend_epochized"])
def test_weight_zero_disables_a_source_at_any_depth(
    make_config: Make, tokenizer: Any, sources: Path, kind: str
) -> None:
    share = {"blend": "weight", "blend_epochized": "repetitions"}[kind]
    off, none = {"path": "./small", share: 0}, {"path": "./not-there", share: 0.0}
    blend(sources / "inner.yaml", {"path": "./big"}, off, none, kind=kind)
    path = blend(sources / "off.yaml", {"path": "./inner.yaml", share: 1}, off, none, kind=kind)
    config = make_config(data_path=path, micro_batch_size=10, verify_images=False)
    keys = {
        key
        for batch in (next(iterator) for iterator in train(config, tokenizer, 1) for _ in range(30))
        for key in batch.__key__
    }
    assert len(keys) == 80 and not any("small" in key for key in keys)


MISTAKES: dict[str, tuple[Any, str]] = {
    "misspelt weight": (
        {"blend": [{"path": "./big", "wieght": 1}]},
        "source 1 (./big) has the unknown key `wieght`: did you mean `weight`?",
    ),
    "misspelt path": (
        {"blend": [{"pth": "./big"}]},
        "source 1 (no path) has the unknown key `pth`: did you mean `path`?",
    ),
    "misspelt blend": (
        {"blnd": [BIG]},
        "split `train` has the unknown key `blnd`: did you mean `blend`?",
    ),
    "text": (
        {"blend": [{"path": "./big", "weight": "0.7"}]},
        "source 1 (./big): weight is the text '0.7', but must be a number",
    ),
    "truth": (
        {"blend": [{"path": "./big", "weight": True}]},
        "weight is True, but must be a number",
    ),
    "negative": (
        {"blend": [BIG, {"path": "./small", "weight": -0.3}]},
        "source 2 (./small): weight is -0.3, but must not be negative",
    ),
    "infinite": (
        {"blend": [{"path": "./big", "weight": 1e999}]},
        "weight is",
    ),
    "all zero": (
        {"blend": [{"path": "./big", "weight": 0}]},
        "the weight of every source is 0",
    ),
    "no repetitions": (
        {"blend_epochized": [{"path": "./big", "repetitions": 0}]},
        "the repetitions of every source is 0",
    ),
    "negative repetitions": (
        {"blend_epochized": [{"path": "./big", "repetitions": -2}]},
        "repetitions is -2",
    ),
    "weight for repetitions": (
        {"blend_epochized": [BIG]},
        "has `weight`, but in this list a source has `repetitions`",
    ),
    "empty list": (
        {"blend": []},
        "`blend` must be a list of sources, not an empty list",
    ),
    "no list": (
        {"blend": {"path": "./big"}},
        "`blend` must be a list of sources, not the mapping",
    ),
    "a path alone": (
        {"blend": ["./big"]},
        "source 1 (the text './big') must hold names and values",
    ),
    "two kinds": (
        {"blend": [BIG], "blend_epochized": [BIG]},
        "must have one of `blend`, `blend_epochized`",
    ),
    "missing folder": (
        {"blend": [BIG, {"path": "./gone"}]},
        "source 2 (./gone) does not exist",
    ),
    "missing file": (
        {"blend": [{"path": "./gone.yaml"}]},
        "source 1 (./gone.yaml) does not exist",
    ),
    "folder without shards": (
        {"blend": [{"path": "./big-records"}]},
        "source 1 (./big-records) holds no prepared shards",
    ),
    "missing split": (
        {"path": "./big", "split_part": "test"},
        "split `train` has no split `test` that can be read",
    ),
    "missing server": (
        {"blend": [{"path": "http://localhost:9/x"}]},
        "source 1 (http://localhost:9/x) cannot be read",
    ),
    "unknown storage": (
        {"blend": [{"path": "ftp://host/x"}]},
        "source 1 (ftp://host/x) names storage that cannot be used",
    ),
    "itself": (
        {"blend": [{"path": "./mistake.yaml"}]},
        "is a metadataset that names itself",
    ),
    "kinds that do not mix": (
        {"blend": [{"path": "./epochs.yaml"}]},
        "is a `blend_epochized`, which cannot be part of a `blend`",
    ),
    "inner mistake": (
        {"blend": [{"path": "./wrong.yaml"}]},
        "source 1 (./big): weight is -1",
    ),
    "subset": (
        {"blend": [{"path": "./big", "subset": {"range": ["75%", "25%"]}}]},
        "subset has the range",
    ),
    "join": (
        {"join": [BIG], "joiner": "x"},
        "has a `join`, which megatron_smar does not read",
    ),
    "aux": (
        {"blend": [BIG | {"aux": {"a": "./small"}}]},
        "has `aux`, which megatron_smar does not read",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_blend_file_is_reported_before_anything_is_built(
    make_config: Make, sources: Path, mistake: str
) -> None:
    split, expected = MISTAKES[mistake]
    blend(sources / "epochs.yaml", {"path": "./big"}, kind="blend_epochized")
    blend(sources / "wrong.yaml", {"path": "./big", "weight": -1})
    path = write(sources / "mistake.yaml", HEAD | {"splits": {"train": split}})
    with pytest.raises(ValueError) as error:
        make_config(data_path=path)
    message = str(error.value)
    assert message.startswith(f"--data-path {path}") and expected in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold names and values"),
        ("splits: [", "is not YAML (line 2"),
        ("splits:\n\ttrain: x", "is not YAML (line 2"),
        ("splits:\n", "line 1 has a name without a value"),
        ("splits: {train: {path: ./big}}\nsplits: {train: {path: ./small}}", "line 2: the name `splits` appears twice"),
        ("a: &x 1\nsplits: {train: {path: *x}}", "line 1 has an anchor or alias"),
        ("splits: !!python/object/apply:os.system ['true']", "line 1 has the tag !!python/object/apply:os.system"),
        ("splits: !local {train: {path: ./big}}", "line 1 has the tag !local"),
        ("split: {train: {path: ./big}}", "unknown key `split`: did you mean `splits`?"),
        ("__module__: megatron.energon\n__class__: MetadatasetV2\n", "has no `splits`"),
        ("splits: {train: {path: ./big}}", "split `train` has the unknown key `path`"),  # energon's first version
        ("- path: ./big", "must hold names and values"),
    ],
)
def test_a_file_that_is_not_a_metadataset_is_reported_with_the_reason(
    make_config: Make, sources: Path, text: str, expected: str
) -> None:
    path = write(sources / "broken.yaml", text)
    with pytest.raises(ValueError) as error:
        make_config(data_path=path)
    assert expected in str(error.value) and path in str(error.value)


def test_a_blend_without_the_requested_split_is_reported(make_config: Make, tokenizer: Any, sources: Path) -> None:
    path = write(sources / "only.yaml", HEAD | {"splits": {"val": {"path": "./big"}}})
    with pytest.raises(DataError, match="has no split `train`, only `val`"):
        build_train_loader(make_config(data_path=path), tokenizer, 0, 1)


def test_energons_first_version_of_metadatasets_is_read(make_config: Make, tokenizer: Any, sources: Path) -> None:
    split = {"datasets": [BIG, SMALL | {"weight": 0}]}
    config = make_config(data_path=write(sources / "first.yaml", {"splits": {"train": split}}), verify_images=False)
    # A single source is not named in keys.
    assert len(shares(train(config, tokenizer, 1), 50)) > 60


@pytest.mark.parametrize("address", ["http://me:hunter2@127.0.0.1:9/a", "https://127.0.0.1:9/a?sig=hunter2"])
def test_a_secret_in_the_path_of_a_source_is_read_or_repeated(make_config: Make, tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError, match="in its address") as error:
        make_config(data_path=blend(tmp_path / "data.yaml", {"path": address, "weight": 1}))
    assert "hunter2" not in str(error.value)


# ---- code


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable module `payload` that creates a file when it is imported; returns that file's path."""
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w')\ndef fn(*args, **more):\n    return {{}}\nclass Thing(dict):\n    pass\n"
    (tmp_path / "modules").mkdir()
    for name in ("modules/payload.py", "sample_loader.py"):
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return mark


FOLDER_FILES = {
    "class": ("dataset.yaml", {"__module__": "payload", "__class__": "Thing"}),
    "function": ("dataset.yaml", {"__module__": "payload", "__function__": "fn"}),
    "energon's other classes": (
        "dataset.yaml",
        {"__module__": "megatron.energon", "__class__": "CaptioningWebdataset"},
    ),
    "sample loader": (
        "dataset.yaml",
        {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "sample_loader": "sample_loader.py:fn"},
    ),
    "part filter": (
        "dataset.yaml",
        {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "part_filter": "sample_loader.py:fn"},
    ),
    "decoder": (
        "dataset.yaml",
        {
            "__module__": "megatron.energon",
            "__class__": "CrudeWebdataset",
            "decoder": {"__module__": "payload", "__class__": "Thing"},
        },
    ),
    "subflavors": (
        "dataset.yaml",
        {
            "__module__": "megatron.energon",
            "__class__": "CrudeWebdataset",
            "subflavors": {"deep": [{"__module__": "payload", "__function__": "fn"}]},
        },
    ),
    "tag": ("dataset.yaml", "__module__: megatron.energon\n__class__: !!python/object/apply:payload.fn []\n"),
    "tag in the split": ("split.yaml", "split_parts: !!python/object/apply:payload.fn []\n"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["folder", "blend"])
@pytest.mark.parametrize("case", FOLDER_FILES)
def test_a_data_folder_runs_no_code(
    make_config: Make, sources: Path, tmp_path: Path, payload: Path, case: str, nested: bool
) -> None:
    shutil.copytree(sources / "big", tmp_path / "big")
    name, content = FOLDER_FILES[case]
    write(tmp_path / "big" / ".nv-meta" / name, content)
    shutil.copy(tmp_path / "sample_loader.py", tmp_path / "big" / ".nv-meta")
    path = blend(tmp_path / "data.yaml", BIG) if nested else str(tmp_path / "big")
    with pytest.raises(ValueError, match=name) as error:
        make_config(data_path=path)
    assert "\n" not in str(error.value)
    assert not payload.exists()


BLEND_FILES: dict[str, Any] = {
    "class": {"__module__": "payload", "__class__": "Thing", "splits": {}},
    "function": {"__module__": "payload", "__function__": "fn", "splits": {}},
    "energon's other classes": {"__module__": "megatron.energon", "__class__": "DatasetLoader", "path": "x"},
    "source": HEAD | {"splits": {"train": {"blend": [{"__module__": "payload", "__class__": "Thing"}]}}},
    "split": HEAD | {"splits": {"train": {"__module__": "payload", "__function__": "fn"}}},
    "subflavors": HEAD
    | {"splits": {"train": {"blend": [BIG | {"subflavors": {"x": {"__module__": "payload", "__class__": "Thing"}}}]}}},
    "joiner": HEAD
    | {"splits": {"train": {"join": [{"path": "./big"}], "joiner": {"__module__": "payload", "__function__": "fn"}}}},
    "other dataset file": HEAD | {"splits": {"train": {"path": "./big", "dataset_config": "other.yaml"}}},
    "dataset file outside": HEAD | {"splits": {"train": {"path": "./big", "dataset_config": "../../other.yaml"}}},
}


@pytest.mark.parametrize("case", BLEND_FILES)
def test_a_blend_file_runs_no_code(make_config: Make, sources: Path, tmp_path: Path, payload: Path, case: str) -> None:
    shutil.copytree(sources / "big", tmp_path / "big")
    for folder in (tmp_path / "big" / ".nv-meta", tmp_path):
        write(folder / "other.yaml", {"__module__": "payload", "__class__": "Thing"})
    path = write(tmp_path / "data.yaml", BLEND_FILES[case])
    with pytest.raises(ValueError, match=r"which a (blend|data) file must not|only class that is loaded"):
        make_config(data_path=path)
    assert not payload.exists()


class Payload:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_members_that_contain_pickles_are_rejected_without_loading(
    make_config: Make, tokenizer: Any, sources: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    shutil.copytree(sources / "big", tmp_path / "big")
    shard = next((tmp_path / "big" / "train").glob("text-*.tar"))
    torch.save(Payload(mark), tensors := io.BytesIO())
    contents = dict.fromkeys(("pyd", "pickle", "pkl", "npy"), pickle.dumps(Payload(mark)))
    contents |= dict.fromkeys(("pth", "pt", "0.pth"), tensors.getvalue())
    with tarfile.open(shard, "w") as tar:
        for number, (suffix, content) in enumerate(contents.items()):
            record = json.dumps({"id": str(number), "text": "The sun rises."}).encode()
            for name, data in ((f"s{number}.json", record), (f"s{number}.{suffix}", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    meta = tmp_path / "big" / ".nv-meta"
    dataset = (meta / "dataset.yaml").read_text()
    shutil.rmtree(meta)
    for path in (tmp_path / "big" / "train").glob("*.idx"):
        path.unlink()
    BaseWebdatasetFactory.prepare_dataset(
        tmp_path / "big",
        [str(shard.relative_to(tmp_path / "big"))],
        split_parts_ratio=None,
        split_parts_patterns=[("train", ".*")],
        workers=1,
    )
    (meta / "dataset.yaml").write_text(dataset)
    config = make_config(data_path=str(tmp_path / "big"), max_consecutive_rejects=len(contents))
    with pytest.raises(DataError, match="in a row"):
        next(EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config))
    assert not mark.exists()


def test_a_loader_state_runs_no_code(tmp_path: Path) -> None:
    torch.save({"dataloader_state_dict": Payload(tmp_path / "mark")}, tmp_path / "state.pt")
    with pytest.raises(DataError, match=r"state\.pt cannot be loaded"):
        load_loader_state(tmp_path / "state.pt")
    assert not (tmp_path / "mark").exists()


def test_preparing_runs_no_code_from_the_output_folder(
    tmp_path: Path, payload: Path, prepare_module: ModuleType
) -> None:
    meta = tmp_path / "out" / ".nv-meta"
    meta.mkdir(parents=True)
    write(meta / "dataset.yaml", {"__module__": "payload", "__class__": "Thing"})
    shutil.copy(tmp_path / "sample_loader.py", meta)
    records = write_records(tmp_path, 5)
    with pytest.raises((SystemExit, ValueError, FileExistsError)):
        prepare_module.prepare(tmp_path / "out", [records], image_root=tmp_path / "images", progress=False)
    prepare_module.prepare(tmp_path / "out", [records], image_root=tmp_path / "images", overwrite=True, progress=False)
    check_sources(str(tmp_path / "out"), "--data-path")
    assert not payload.exists()
