# SPDX-License-Identifier: Apache-2.0
"""Resuming: at whatever step a run stopped, the samples after it equal those of an uninterrupted run."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_smar.data import DataConfig, DataError, EnergonIterator, build_train_loader
from megatron_smar.data.sample_log import RecordedSamples, read_recorded
from megatron_smar.data.state import WORKER_BATCHES, load_rank_state, redistribute

Make = Callable[..., DataConfig]
Steps = list[list[list[str]]]
States = list[dict[str, Any]]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*use of fork.*")


class Run:
    """The loaders of all data-parallel ranks, read step by step as training does.

    Args:
        config: Data configuration.
        tokenizer: Megatron's tokenizer.
        size: Number of data-parallel ranks.
        batches: Micro-batches per step on each rank.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, size: int, batches: int) -> None:
        self.batches = batches
        loaders = [build_train_loader(config, tokenizer, rank, size) for rank in range(size)]
        self.ranks = [EnergonIterator(loader, config) for loader in loaders]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        for rank in self.ranks:
            rank.close()

    def steps(self, count: int) -> Steps:
        """Returns, for each step, the sorted keys of its micro-batches; the order of a step's micro-batches is free."""
        return [
            sorted(list(next(rank).__key__) for rank in self.ranks for _ in range(self.batches)) for _ in range(count)
        ]

    def save(self) -> States:
        """Returns the states of all ranks."""
        return [rank.save_state() for rank in self.ranks]

    def restore(self, states: States) -> "Run":
        """Resumes from the states of all ranks."""
        for rank, state in zip(self.ranks, states, strict=True):
            rank.restore_state(copy.deepcopy(state))
        return self


@pytest.fixture
def blend(shards: Path, tmp_path: Path) -> str:
    """A metadataset that mixes both splits of the shards."""
    sources = [
        {"weight": weight, "path": str(shards), "split_part": part} for weight, part in ((3, "train"), (1, "val"))
    ]
    path = tmp_path / "blend.yaml"
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": sources}}}
    path.write_text(yaml.safe_dump(content))
    return str(path)


# Kinds of data, each of which has to resume exactly; new kinds go here.
KINDS: dict[str, dict[str, Any]] = {
    "folder": {},
    "blend": {"data_path": "blend"},
    "packs": {"packing_buffer_size": 6, "micro_batch_size": 1},
    "share of text": {"text_only_ratio": 0.3},
}


@pytest.fixture
def config(kind: str, make_config: Make, blend: str) -> DataConfig:
    """A configuration of this kind."""
    return make_config(**{name: blend if value == "blend" else value for name, value in KINDS[kind].items()})


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_at_any_step_does_not_change_later_samples(config: DataConfig, tokenizer: Any) -> None:
    with Run(config, tokenizer, 2, batches=2) as run:
        uninterrupted = run.steps(8)
    with Run(config, tokenizer, 2, batches=2) as run:
        for step in range(1, 6):
            run.steps(1)
            with Run(config, tokenizer, 2, batches=2) as resumed:
                assert resumed.restore(run.save()).steps(3) == uninterrupted[step : step + 3], (
                    f"stopped after step {step}"
                )


@pytest.mark.parametrize(("kind", "num_workers"), [("folder", 1), ("packs", 2)])
def test_worker_processes_resume_too(config: DataConfig, num_workers: int, tokenizer: Any) -> None:
    config.num_workers = num_workers
    with Run(config, tokenizer, 1, batches=1) as run:
        run.steps(3)  # of two workers, the second has the next micro-batch
        states, later = run.save(), run.steps(4)
    with Run(config, tokenizer, 1, batches=1) as resumed:
        assert resumed.restore(states).steps(4) == later


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [("folder", (2, 1), (1, 2)), ("packs", (1, 2), (2, 1)), ("share of text", (2, 1), (1, 2))],
)
def test_the_same_number_of_workers_on_other_ranks_reads_the_same_steps(
    config: DataConfig, old: tuple[int, int], new: tuple[int, int], tokenizer: Any, tmp_path: Path
) -> None:
    """Through state files, as Megatron's maybe_save_dataloader_state writes them."""

    def layout(size: int, num_workers: int) -> Run:
        return Run(dataclasses.replace(config, num_workers=num_workers), tokenizer, size, batches=2 // size)

    with layout(*old) as run:
        run.steps(3)
        for number, state in enumerate(run.save()):
            torch.save({"dataloader_state_dict": state}, tmp_path / f"{number}.pt")
        later = run.steps(4)
    with layout(*new) as moved:
        place = (*new, 2 // new[0])
        states = [load_rank_state(lambda rank: tmp_path / f"{rank}.pt", number, *place) for number in range(new[0])]
        assert moved.restore(states).steps(4) == later


@pytest.mark.parametrize(
    ("size", "num_workers", "num_microbatches", "message"),
    [
        (4, 2, 2, r"saved with 2 data-parallel ranks x --num-workers 2, and this run has 4 x --num-workers 2.*"
                  r"give --num-workers 1, or read"),
        (3, 2, 2, "resume with what it was saved with, or read"),
        (2, 0, 2, "give --num-workers 2, or read"),
        (1, 4, 2, "a step has 2 on a rank: resume with what it was saved with"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_resume_is_refused_in_one_sentence(
    size: int, num_workers: int, num_microbatches: int, message: str
) -> None:
    layout = {"data-parallel size": 2, "--num-workers": 2, WORKER_BATCHES: [5, 5]}
    states = [{"layout": layout, "loader": {"worker_states": ["a", "b"], "next_worker_id": 0}}] * 2
    with pytest.raises(DataError, match=message):
        redistribute(states, 0, size, num_workers, num_microbatches)


def test_workers_at_different_steps_are_not_redistributed() -> None:
    layout = {"data-parallel size": 1, "--num-workers": 2, WORKER_BATCHES: [5, 5]}
    state = {"layout": layout, "loader": {"worker_states": ["a", "b"], "next_worker_id": 1}}
    with pytest.raises(DataError, match="resume with what it was saved with"):
        redistribute([state], 0, 2, 1, 1)


class Batches:
    """An iterator of micro-batches with keys."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = iter(keys)

    def __next__(self) -> SimpleNamespace:
        return SimpleNamespace(__key__=[next(self.keys)])


def record(folder: Path, rank: int, size: int, steps_done: int, keys: str) -> None:
    step = itertools.count(steps_done + 1)
    batches: Any = Batches(list(keys))
    recorded = RecordedSamples(batches, folder, rank, size, steps_done, lambda: next(step))
    for _ in keys:
        next(recorded)


def test_the_sample_log_drops_the_steps_that_a_killed_run_lost(tmp_path: Path) -> None:
    record(tmp_path, 0, 2, 0, "abcd")
    record(tmp_path, 1, 2, 0, "ABCD")
    with (tmp_path / "rank000.jsonl").open("a") as file:
        file.write('{"step": 5, "ke')
    assert read_recorded(tmp_path)[4] == {0: [["d"]], 1: [["D"]]}
    record(tmp_path, 0, 1, 2, "xy")  # from the checkpoint of step 2, on one rank
    steps = {
        step: {rank: keys[0][0] for rank, keys in ranks.items()} for step, ranks in read_recorded(tmp_path).items()
    }
    assert steps == {1: {0: "a", 1: "A"}, 2: {0: "b", 1: "B"}, 3: {0: "x"}, 4: {0: "y"}}
