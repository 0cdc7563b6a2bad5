# SPDX-License-Identifier: Apache-2.0
"""Loaders over real shards: order, resuming, worker processes, errors."""

import gc
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.energon.flavors.webdataset.itar import ITarFile

from megatron_smar.data import (
    ConversationTaskEncoder,
    DataConfig,
    DataError,
    EnergonIterator,
    build_train_loader,
    build_valid_loader,
    load_loader_state,
    read_rejects,
)
from megatron_smar.data.tokens import TextEncoder
from megatron_smar.runtime.environment import detect_environment
from megatron_smar.runtime.repairs import forget_members_that_were_read

from .conftest import picture, talk, write_records

Make = Callable[..., DataConfig]
# Without a GPU, torch warns that pinned memory has no effect.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


_opened: list[EnergonIterator] = []


@pytest.fixture(autouse=True)
def close_iterators() -> Iterator[None]:
    """Ends the worker processes of each test."""
    yield
    while _opened:
        _opened.pop().close()


def train(config: DataConfig, tokenizer: Any, rank: int = 0, size: int = 1, **options: Any) -> EnergonIterator:
    _opened.append(EnergonIterator(build_train_loader(config, tokenizer, rank, size, **options), config))
    return _opened[-1]


def valid(config: DataConfig, tokenizer: Any, num_batches: int, rank: int = 0, size: int = 1) -> EnergonIterator:
    loader = build_valid_loader(config, tokenizer, rank, size, num_batches=num_batches)
    _opened.append(EnergonIterator(loader, config, batches_per_pass=num_batches))
    return _opened[-1]


def keys(iterator: EnergonIterator, count: int) -> list[list[str]]:
    return [next(iterator).__key__ for _ in range(count)]


def test_an_epoch_has_every_sample_once_and_placeholders_match_tiles(make_config: Make, tokenizer: Any) -> None:
    iterator = train(make_config(shuffle_buffer_size=1), tokenizer)
    batches = [next(iterator) for _ in range(25)]
    assert sorted(key for batch in batches for key in batch.__key__) == [f"train_{i:09d}" for i in range(50)]
    context = TextEncoder(tokenizer).image_tokens.context_id
    assert all((batch.input_ids == context).sum() == 4 * len(batch.pixel_values) for batch in batches)


RESUME = """
import pickle, sys
from megatron.core.tokenizers import MegatronTokenizer
from megatron_smar.data import EnergonIterator, build_train_loader, load_loader_state
path, runs = pickle.load(open(sys.argv[1], "rb"))
tokenizer = MegatronTokenizer.from_pretrained(tokenizer_path=path, metadata_path={"library": "sentencepiece"})
results = []
for config, state in runs:
    iterator = EnergonIterator(build_train_loader(config, tokenizer, 0, 1), config)
    iterator.restore_state(load_loader_state(state))
    results.append([(batch.__key__, batch.input_ids.tolist()) for batch in (next(iterator) for _ in range(30))])
    iterator.close()
pickle.dump(results, open(sys.argv[2], "wb"))
"""


def test_a_new_process_resumes_with_the_next_sample(make_config: Make, tokenizer: Any, tmp_path: Path) -> None:
    runs, expected = [], []
    for num_workers in (0, 1, 2):
        config = make_config(num_workers=num_workers)
        iterator = train(config, tokenizer)
        for _ in range(7):
            next(iterator)
        state = tmp_path / f"state{num_workers}.pt"
        # As Megatron's maybe_save_dataloader_state does.
        torch.save({"dataloader_state_dict": RerunDataIterator(iterator).iterable.save_state()}, state)
        expected.append([(batch.__key__, batch.input_ids.tolist()) for batch in (next(iterator) for _ in range(30))])
        runs.append((config, str(state)))
    (tmp_path / "runs").write_bytes(pickle.dumps((str(tokenizer.path), runs)))
    command = [sys.executable, "-W", "ignore", "-c", RESUME, str(tmp_path / "runs"), str(tmp_path / "results")]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[3])
    assert pickle.loads((tmp_path / "results").read_bytes()) == expected


@pytest.mark.matrix
def test_states_saved_before_the_first_batch_or_right_after_restoring_are_correct(
    make_config: Make, tokenizer: Any
) -> None:
    config = make_config(num_workers=1)
    first, second, third = (train(config, tokenizer) for _ in range(3))
    second.restore_state(first.save_state())
    assert keys(second, 5) == keys(first, 5)
    third.restore_state(first.save_state())
    fourth = train(config, tokenizer)
    fourth.restore_state(third.save_state())
    assert keys(fourth, 5) == keys(first, 5)


def open_tar_files() -> list[ITarFile]:
    """Returns this process's open tar files."""
    return [item for item in gc.get_objects() if isinstance(item, ITarFile)]


def test_open_tar_files_do_not_keep_the_members_that_were_read(
    make_config: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In workers too: there the count is written to a file for each sample."""
    forget_members_that_were_read(detect_environment("cpu"))  # as runtime.install() does in every program
    earlier = open_tar_files()  # of tests that ran without the adaptation

    def members_kept() -> list[int]:
        return [len(file.members) for file in open_tar_files() if not any(file is other for other in earlier)]

    iterator = train(make_config(), tokenizer)
    keys(iterator, 60)
    kept = members_kept()
    assert kept and not any(kept)
    tokenize = ConversationTaskEncoder.tokenize_sample

    def note(self: Any, sample: Any) -> Any:
        with (tmp_path / "kept").open("a") as file:
            print(os.getpid(), max(members_kept()), file=file)
        return tokenize(self, sample)

    monkeypatch.setattr(ConversationTaskEncoder, "tokenize_sample", note)
    keys(train(make_config(num_workers=1), tokenizer), 12)
    lines = [line.split() for line in (tmp_path / "kept").read_text().splitlines()]
    assert len(lines) > 20 and {kept for _, kept in lines} == {"0"} and str(os.getpid()) not in dict(lines)


@pytest.mark.parametrize("workers", [0, 1])
def test_starting_to_read_draws_from_the_generator_of_dropout(make_config: Make, tokenizer: Any, workers: int) -> None:
    """A run that is resumed starts to read once more than one that is not."""
    before = torch.get_rng_state()
    keys(train(make_config(num_workers=workers), tokenizer), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.matrix
def test_two_workers_alternate_between_the_batches_of_two_ranks(make_config: Make, tokenizer: Any) -> None:
    one = keys(train(make_config(num_workers=2), tokenizer), 20)
    ranks = [keys(train(make_config(num_workers=1), tokenizer, rank, 2), 10) for rank in range(2)]
    assert one == [batch for pair in zip(*ranks, strict=True) for batch in pair]


def test_pipeline_stages_of_one_rank_read_the_same_tokens(make_config: Make, tokenizer: Any) -> None:
    first, last = train(make_config(), tokenizer), train(make_config(), tokenizer, decode_images=False)
    for _ in range(12):
        one, other = next(first), next(last)
        assert torch.equal(one.input_ids, other.input_ids) and other.pixel_values.shape == (0, 3, 16, 16)


def test_the_seed_determines_the_order(make_config: Make, tokenizer: Any) -> None:
    orders = [keys(train(make_config(seed=seed), tokenizer), 10) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("num_workers", "num_batches"), [(0, 8), (1, 4), pytest.param(2, 8, marks=pytest.mark.matrix)])
def test_every_evaluation_sees_the_same_samples(
    num_workers: int, num_batches: int, make_config: Make, tokenizer: Any
) -> None:
    iterator = valid(make_config(num_workers=num_workers), tokenizer, num_batches)
    passes = [keys(iterator, num_batches) for _ in range(3)]
    assert passes[0] == passes[1] == passes[2]
    seen = {key for batch in passes[0] for key in batch}
    assert len(seen) == (11 if num_batches == 8 else 8)


def test_the_last_batch_of_a_pass_has_the_shape_of_all_others(make_config: Make, tokenizer: Any) -> None:
    iterator = valid(make_config(pad_to=256), tokenizer, 6)
    assert {next(iterator).input_ids.shape for _ in range(6)} == {(2, 256)}


def test_a_validation_state_is_refused(make_config: Make, tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="Only the training loader has a state"):
        valid(make_config(), tokenizer, 2).save_state()


def test_resuming_in_another_layout_names_what_changed(make_config: Make, tokenizer: Any) -> None:
    state = train(make_config(), tokenizer).save_state()
    with pytest.raises(DataError, match=r"\(--num-workers was 0 and is 1\)"):
        train(make_config(num_workers=1), tokenizer).restore_state(state)
    with pytest.raises(DataError, match="data-parallel size was 1 and is 2"):
        train(make_config(), tokenizer, 0, 2).restore_state(state)


def test_an_unreadable_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.pt cannot be loaded"):
        load_loader_state(tmp_path / "none.pt")


def test_too_few_samples_for_the_workers_are_reported(make_config: Make, tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"fewer training samples than there are workers \(60 data-parallel ranks x 1\)"
    ):
        train(make_config(), tokenizer, 59, 60)
    with pytest.raises(DataError, match="no validation samples for data-parallel rank"):
        valid(make_config(), tokenizer, 2, 11, 12)


def test_all_ranks_report_too_few_samples_with_the_same_message(make_config: Make, tokenizer: Any) -> None:
    """A rank without the error would continue and wait forever for the others."""

    def sentence(build: Callable[[], Any]) -> str:
        with pytest.raises(DataError) as error:
            build()
        return str(error.value)

    assert len({sentence(lambda: train(make_config(), tokenizer, rank, 60)) for rank in range(60)}) == 1  # noqa: B023
    assert len({sentence(lambda: valid(make_config(), tokenizer, 2, rank, 12)) for rank in range(12)}) == 1  # noqa: B023


def test_a_missing_validation_split_is_reported(
    make_config: Make, tokenizer: Any, tmp_path: Path, prepare_module: ModuleType
) -> None:
    records = write_records(tmp_path, 4)
    prepare_module.prepare(tmp_path / "out", [records], image_root=tmp_path / "images", progress=False)
    with pytest.raises(DataError, match=r"cannot be read as a validation set, a split called `val`"):
        valid(make_config(data_path=str(tmp_path / "out")), tokenizer, 2)


@pytest.fixture
def shards_with(tmp_path: Path, prepare_module: ModuleType) -> Callable[[int, int], str]:
    """Prepares shards with given numbers of good samples and of samples whose text is too long."""

    def make(good: int, bad: int) -> str:
        texts = ["Short."] * good + ["Long, " * 400] * bad
        records = [{"conversations": talk("<image> What?", text), "image": "a.png"} for text in texts]
        (tmp_path / "a.png").write_bytes(picture())
        (tmp_path / "records.json").write_text(json.dumps(records))
        files = [tmp_path / "records.json"]
        prepare_module.prepare(tmp_path / "out", files, files, image_root=tmp_path, progress=False)
        return str(tmp_path / "out")

    return make


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_samples_are_skipped_and_counted_over_workers(
    num_workers: int, make_config: Make, tokenizer: Any, tmp_path: Path, shards_with: Callable[[int, int], str]
) -> None:
    folder = tmp_path / "rejects"
    settings = {"num_workers": num_workers, "rejects_dir": str(folder), "max_skip_ratio": 1.0}
    config = make_config(data_path=shards_with(12, 5), **settings)
    seen = {key for batch in keys(train(config, tokenizer), 40) for key in batch}
    assert seen == {f"train_{i:09d}" for i in range(12)}
    assert read_rejects(folder) == {"too_long": 5}


def test_only_one_of_the_ranks_with_the_same_samples_reports_rejects(
    make_config: Make, tokenizer: Any, tmp_path: Path, shards_with: Callable[[int, int], str]
) -> None:
    config = make_config(data_path=shards_with(12, 5), rejects_dir=str(tmp_path / "rejects"))
    keys(train(config, tokenizer, announce_rejects=False), 20)
    assert not (tmp_path / "rejects").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_one_good_sample_ends_with_a_sentence(
    num_workers: int, make_config: Make, tokenizer: Any, shards_with: Callable[[int, int], str]
) -> None:
    config = make_config(data_path=shards_with(0, 6), num_workers=num_workers, max_consecutive_rejects=20)
    with pytest.raises(DataError) as error:
        next(train(config, tokenizer))
    assert str(error.value).startswith("The last 20 samples in a row from ") and "too_long       20  100.00%" in str(
        error.value
    )
    assert "Traceback" not in str(error.value)
    with pytest.raises(DataError, match="none of its samples could be used"):
        next(valid(config, tokenizer, 4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_shard_ends_with_a_sentence(
    num_workers: int, make_config: Make, tokenizer: Any, shards_with: Callable[[int, int], str]
) -> None:
    path = shards_with(6, 0)
    (Path(path) / "train/image-000000.tar").write_bytes(b"gone")
    with pytest.raises(DataError) as error:
        next(train(make_config(data_path=path, num_workers=num_workers), tokenizer))
    assert str(error.value).startswith("Reading the data from ") and "Traceback" not in str(error.value)
