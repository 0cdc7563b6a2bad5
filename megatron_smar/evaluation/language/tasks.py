# SPDX-License-Identifier: Apache-2.0
"""Language benchmarks of the lm-evaluation-harness: the paper's eight as a preset, and any other of its tasks.

`load_tasks` checks everything that a run needs (names, data, permission to run code) and reads the data, before a
model is loaded; `LanguageTasks.run` evaluates a model. The tasks are the harness's own; what this project fixes is the
number of examples, the chat template, the main metric and the seed.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megatron_smar.evaluation.language.code_execution import FLAG, CodeExecutionError, check_isolation
from megatron_smar.evaluation.language.local_data import (
    DataError,
    Request,
    check_nltk_data,
    go_offline,
    is_hub_dataset,
    local_datasets,
    local_metrics,
    overrides,
    without_missing_splits,
)
from megatron_smar.evaluation.language.task_config import PRESET, LanguageConfig, TaskError
from megatron_smar.evaluation.language.task_run import LanguageTasks, is_first_process

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Tasks that run code through the metric `code_eval`, which the sandbox replaces; others would run it unprotected.
SANDBOXED = ("humaneval", "mbpp", "humaneval_infilling")
NEEDS_NLTK = "ifeval"  # part of the path of the tasks that import the harness's IFEval


def require_harness() -> None:
    """Checks that the harness is installed.

    Raises:
        TaskError: It is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TaskError(
            f'--tasks needs the lm-evaluation-harness ({error}): pip install "megatron_smar[eval]".'
        ) from None


def load_tasks(config: LanguageConfig) -> LanguageTasks:
    """Checks and loads the tasks with their data; no model is needed, and none should be loaded before.

    Args:
        config: What is evaluated.

    Raises:
        TaskError: A task is unknown or cannot be loaded.
        DataError: Data is missing in the folder.
        CodeExecutionError: A task runs generated code, which is not allowed or not possible here.
    """
    if config.folder is not None:
        go_offline()  # before the harness imports datasets
    require_harness()
    manager = _manager(config.task_files)
    _check_names(config.names, manager)
    leaves = {name: dict(_leaves(manager, name)) for name in config.names}
    _check_overlap(leaves)
    _check_code(config, leaves)
    _check_data(config, leaves)
    count = sum(map(len, leaves.values()))
    with _quiet(), tqdm(total=count, desc="reading data", unit="task", disable=not is_first_process()) as bar:
        return LanguageTasks(config, {name: _load(config, manager, name, bar.update) for name in config.names})


@cache
def _manager(task_files: Path | None = None) -> TaskManager:
    """Returns the harness's index of its tasks and of further task files; reading it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if task_files is None else str(task_files))


def _check_names(names: Sequence[str], manager: TaskManager) -> None:
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [PRESET, *manager.all_tasks], 4)
            hint = f"the nearest names are {', '.join(near)}" if near else "lm_eval ls tasks lists its tasks"
            raise TaskError(f"--tasks {name} is unknown to lm_eval {version('lm_eval')}; {hint}.")


def _leaves(manager: TaskManager, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the tasks of a task, group or tag: name and configuration, in which no function is resolved."""
    entry = manager.task_index[name]
    if entry.tags and entry.cfg is None:
        for member in sorted(entry.tags):
            yield from _leaves(manager, member)
        return
    config: dict[str, Any] = entry.cfg or {}
    if "group" not in config:
        yield name, config | {"task": name, "file": str(entry.yaml_path)}
        return
    for item in config.get("task") or []:
        member = item if isinstance(item, str) else item.get("group") or item.get("task")
        if isinstance(member, str) and member in manager.task_index:
            own = item if isinstance(item, dict) else {}
            yield from ((leaf, found | own | {"task": leaf}) for leaf, found in _leaves(manager, member))


def _check_overlap(leaves: Mapping[str, Mapping[str, Any]]) -> None:
    owner: dict[str, str] = {}
    for name, members in leaves.items():
        for member in members:
            if owner.setdefault(member, name) != name:
                raise TaskError(
                    f"{member} is part of both {owner[member]} and {name} of --tasks: name only one of them."
                )


def _check_code(config: LanguageConfig, leaves: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    unsafe = {
        name: [Path(leaf["file"]).parent.name for leaf in members.values() if leaf.get("unsafe_code")]
        for name, members in leaves.items()
    }
    running = [name for name, places in unsafe.items() if places]
    outside = [name for name in running if set(unsafe[name]) - set(SANDBOXED)]
    if outside:
        raise CodeExecutionError(
            f"--tasks {' '.join(outside)} would run code that the model wrote outside of this project's sandbox: leave "
            "them out."
        )
    if running and not config.allow_code_execution:
        raise CodeExecutionError(
            f"--tasks {' '.join(running)} would run code that the model wrote: allow it with {FLAG}, or leave them out."
        )
    if running:
        check_isolation()


def _check_data(config: LanguageConfig, leaves: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Checks that the folder has the data of all tasks; the message names every missing data set."""
    problems: dict[str, str] = {}
    for name, members in leaves.items():
        if any(f"/{NEEDS_NLTK}/" in leaf["file"] for leaf in members.values()):
            try:
                check_nltk_data(config.folder, name)
            except DataError as error:
                problems["NLTK's punkt_tab"] = str(error)
        if config.folder is None:
            continue
        for leaf in members.values():
            if is_hub_dataset(leaf):
                shots = config.shots(name, leaf.get("num_fewshot"))
                try:
                    _local(config.folder, leaf, shots)
                except DataError as error:
                    problems.setdefault(leaf["dataset_path"], str(error))
    if problems:
        first, *others = problems
        more = f" Unusable are also: {', '.join(others)}." if others else ""
        raise DataError(problems[first] + more)


def _local(folder: Path, config: Mapping[str, Any], shots: int) -> dict[str, Any]:
    """Returns what a task's configuration needs in order to read local files."""
    request = Request.of(config, shots)
    kwargs = {
        k: v for k, v in (config.get("dataset_kwargs") or {}).items() if k not in ("trust_remote_code", "revision")
    }
    place = folder / request.dataset
    if place.is_dir() and kwargs.keys() & {"data_files", "data_dir"}:  # relative to the data set's folder
        return {"dataset_path": str(place), "dataset_kwargs": kwargs}
    local = overrides(folder, request)
    files = (local.get("dataset_kwargs") or {}).get("data_files")
    unused = {} if files is None else without_missing_splits(config, files)
    return local | {"dataset_kwargs": kwargs | (local.get("dataset_kwargs") or {})} | unused


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars and warnings of the libraries, of which there would be one for each of 140 tasks."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _load(config: LanguageConfig, manager: TaskManager, name: str, loaded_one: Callable[[], Any]) -> dict[str, Any]:
    """Returns the harness's task objects of a task, group or tag, as `TaskManager.load` does."""
    from lm_eval.tasks._factory import TaskFactory

    class LocalFactory(TaskFactory):
        """Replaces where a task reads its data, and nothing else of its configuration."""

        def _load_full_config(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
            own = super()._load_full_config(*arguments, **keywords)
            if "group" not in own:
                loaded_one()
            if config.folder is None or not is_hub_dataset(own):
                return own
            return own | _local(config.folder, own, config.shots(name, own.get("num_fewshot")))

    manager._factory = LocalFactory(meta=manager.metadata)
    try:
        with local_metrics(config.folder), local_datasets(config.folder, name):
            loaded: dict[str, Any] = dict(manager.load([name]))
    except (TaskError, DataError, CodeExecutionError):
        raise
    except Exception as error:  # of any of the harness's thousands of tasks, or of datasets
        lines = str(error).strip().splitlines() or [""]
        raise TaskError(f"The harness cannot load {name} of --tasks: {type(error).__name__}: {lines[0]}") from error
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=config.shots(name, task.get_config("num_fewshot")))
    return loaded
