# SPDX-License-Identifier: Apache-2.0
"""What the evaluation harness would download, from a folder: data sets, NLTK's sentence splitter, metric scripts.

    FOLDER/ORG/NAME/...                         a data set of the hub, as `hf download --local-dir` writes it
    FOLDER/nltk_data/tokenizers/punkt_tab/      NLTK's data, which IFEval needs
    FOLDER/evaluate-metric/NAME/NAME.py         a script that `evaluate.load(NAME)` runs, for the few tasks with one

A data set whose README.md lists its configs is read as on the hub. Otherwise the files of a config are in a folder of
the config's name, as parquet, JSON, JSON lines or CSV, and are named after their splits: `test.jsonl`,
`dev-00000-of-00001.parquet`, `train/0000.parquet`.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_smar.evaluation.language.code_execution import CodeEval

NLTK_DATA, METRICS = "nltk_data", "evaluate-metric"
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
FORMATS = {*BUILDERS.values(), "text"}
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test")
SHARD = re.compile(r"-\d+-of-\d+$")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


class DataError(ValueError):
    """Data that a task needs is missing or unusable; the message is one sentence for the user."""


@dataclass(frozen=True)
class Request:
    """What a task reads.

    Attributes:
        task: The task's name in the harness.
        dataset: The data set on the hub, `ORG/NAME`.
        config: Name of the data set's config (subset), or None.
        splits: The splits without which the task does not run.
    """

    task: str
    dataset: str
    config: str | None
    splits: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], shots: int) -> Request:
        """Reads the request from a task's configuration.

        Args:
            config: The task's configuration in the harness.
            shots: Number of examples in each prompt; without any, the split that they are taken from is not needed.
        """
        evaluated = config.get("test_split") or config.get("validation_split")
        examples = config.get("fewshot_config") or {}
        source = config.get("fewshot_split") or examples.get("split")
        if source is None and "samples" not in examples:
            source = config.get("training_split") or config.get("validation_split")
        splits = [evaluated, source if shots else None]
        name, subset = config["dataset_path"], config.get("dataset_name")
        return cls(str(config["task"]), name, subset, tuple(dict.fromkeys(split for split in splits if split)))


def is_hub_dataset(config: Mapping[str, Any]) -> bool:
    """Returns whether a task's configuration names a data set on the hub, not a format or a Python function."""
    path = config.get("dataset_path")
    return isinstance(path, str) and path not in FORMATS and not config.get("custom_dataset")


def overrides(folder: Path, request: Request) -> dict[str, Any]:
    """Returns the entries of a task's configuration that make it read local files.

    Args:
        folder: The folder with the data sets.
        request: What the task reads.

    Raises:
        DataError: The files are missing; the message names them and where to get them.
    """
    place = folder / request.dataset
    if not place.is_dir():
        raise DataError(
            f"{place} is not a folder: {request.task} needs the hub's data set {request.dataset} there "
            f"(hf download --repo-type dataset {request.dataset} --local-dir {place})."
        )
    configs = _configs(place)
    if configs:
        _check_config(place, request, configs)
        return {"dataset_path": str(place)}
    builder, files = _files(place, request)
    return {"dataset_path": builder, "dataset_kwargs": {"data_files": files}}


def without_missing_splits(config: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, None]:
    """Returns the splits that a task's configuration names and that have no file, each as None.

    The harness opens every split of a configuration, also one from which no example is taken.
    """
    names = ("training_split", "validation_split", "fewshot_split", "test_split")
    return {name: None for name in names if config.get(name) is not None and config[name] not in files}


def _configs(place: Path) -> dict[str, Any]:
    """Returns the configs that the README.md of a data set lists, {} if it lists none."""
    readme = place / "README.md"
    parts = readme.read_text(encoding="utf-8").split("---\n", 2) if readme.is_file() else []
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(f"The header of {readme} is not YAML: {str(error).splitlines()[0]}.") from None
    configs = header.get("configs") if isinstance(header, dict) else None
    return {item["config_name"]: item for item in configs or [] if "config_name" in item}


def _check_config(place: Path, request: Request, configs: Mapping[str, Any]) -> None:
    """Checks that a config is listed and that its files are there."""
    name = request.config or ("default" if "default" in configs else next(iter(configs)))
    if name not in configs:
        raise DataError(f"{place}/README.md lists no config {name}, which {request.task} reads; download it anew.")
    listed = configs[name].get("data_files")
    for item in listed if isinstance(listed, list) else [listed]:
        patterns = item.get("path") if isinstance(item, dict) else item
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            if not any(place.glob(pattern)):
                raise DataError(
                    f"{place} has no file {pattern}, which its README.md lists for {name} and {request.task} reads: "
                    f"complete it with hf download --repo-type dataset {request.dataset} --local-dir {place}."
                )


def _files(place: Path, request: Request) -> tuple[str, dict[str, list[str]]]:
    """Returns the format of a config's files, and the files of each split."""
    root = place / request.config if request.config else place
    if not root.is_dir():
        raise DataError(
            f"{place} has neither a README.md that lists its configs nor a folder {request.config}, which "
            f"{request.task} reads (hf download --repo-type dataset {request.dataset} --local-dir {place})."
        )
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(root.rglob("*")):
        builder = BUILDERS.get(path.suffix)
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if builder and not hidden and path.name != "dataset_infos.json":
            found[builder][_split(path, request.splits)].append(str(path))
    for builder in dict.fromkeys(BUILDERS.values()):
        if found.get(builder) and all(split in found[builder] for split in request.splits):
            return builder, {split: _one_folder(files, request) for split, files in found[builder].items()}
    present = sorted({split for files in found.values() for split in files})
    missing = next((split for split in request.splits if split not in present), "that are all of one format")
    raise DataError(
        f"{root} has no file of the split {missing}, which {request.task} reads; expected is {missing}.parquet, "
        f"{missing}.jsonl, {missing}.csv or a folder {missing} (found: {', '.join(present) or 'no data file'})."
    )


def _split(path: Path, wanted: Sequence[str]) -> str:
    """Returns the split that a file belongs to, by its name or its folder's; "train" for any other, as on the hub."""
    stem = SHARD.sub("", path.name.partition(".")[0])
    known = {*wanted, *SPLITS}
    return next((name for name in (stem, path.parent.name) if name in known), "train")


def _one_folder(files: list[str], request: Request) -> list[str]:
    """Checks that the files of a split are in one folder, so that no two configs are mixed."""
    if len({os.path.dirname(name) for name in files}) > 1:
        raise DataError(
            f"{files[0]} and {files[-1]} are in two folders, and {request.task} names no config: remove one of them."
        )
    return files


def go_offline() -> None:
    """Forbids the Hugging Face libraries the network in this process, also those that are imported already."""
    for name in _OFFLINE:
        os.environ[name] = "1"
    for module in ("huggingface_hub.constants", "datasets.config", "evaluate.config"):
        for name in _OFFLINE:
            if module in sys.modules and hasattr(sys.modules[module], name):
                setattr(sys.modules[module], name, True)


def check_nltk_data(folder: Path | None, task: str) -> None:
    """Makes NLTK's sentence splitter available from the folder, and checks that it is there.

    Args:
        folder: The folder with the data sets; None: only NLTK's own places are searched.
        task: The task that needs it, for the message.

    Raises:
        DataError: NLTK or its data is missing; without a folder the harness downloads the data.
    """
    try:
        import nltk
    except ImportError:
        raise DataError(f'{task} needs NLTK: pip install "megatron_smar[eval]".') from None
    if folder is None:
        return
    place = str((folder / NLTK_DATA).absolute())
    if place not in nltk.data.path:
        nltk.data.path.insert(0, place)
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise DataError(
            f"{place}/tokenizers/punkt_tab is not usable: {task} needs NLTK's punkt_tab there, in files that nobody "
            f"but you may write (python -m nltk.downloader -d {place} punkt_tab)."
        ) from None


@contextmanager
def local_metrics(folder: Path | None) -> Iterator[None]:
    """Replaces `evaluate.load` while tasks are loaded: some load a metric's script from the hub when imported.

    `code_eval` becomes this project's sandbox. With a folder, other scripts are read from it.

    Raises:
        DataError: A script is not in the folder.
    """
    import evaluate

    original = evaluate.load

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "code_eval":
            return CodeEval()
        if folder is None:
            return original(name, *args, **kwargs)
        script = folder / METRICS / name / f"{name}.py"
        if not script.is_file():
            raise DataError(f"{script} is not a file: the metric {name} needs the script of the hub there.")
        return original(str(script.parent), *args, **kwargs)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original


@contextmanager
def local_datasets(folder: Path | None, task: str) -> Iterator[None]:
    """Replaces `datasets.load_dataset` while tasks are loaded: those written in Python read their data by it.

    Args:
        folder: The folder with the data sets; None: nothing is replaced.
        task: The task that is loaded, for messages.

    Raises:
        DataError: A data set is not in the folder.
    """
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if folder is None or path in FORMATS or os.path.exists(path):
            return original(path, name, *args, **kwargs)
        local = overrides(folder, Request(task, path, name, ()))
        kwargs = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "revision")}
        return original(local["dataset_path"], name, *args, **kwargs | local.get("dataset_kwargs", {}))

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original
