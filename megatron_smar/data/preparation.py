# SPDX-License-Identifier: Apache-2.0
"""Converts published datasets, or a user's records, to the shards that training reads: what `prepare.py` does."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import yaml
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from tqdm import tqdm

from megatron_smar.data.sources import FORMATS, Base64Images, SourceRecord, Unreadable, read_source
from megatron_smar.data.sources.report import SplitReport
from megatron_smar.data.sources.shards import WORK, RecordFile, Shard, write_shard, write_whole

META = ".nv-meta"
LAYOUT = 3  # incremented whenever the same arguments give different shards
DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {"format": "conversation"}}
# Split part -> prefix of its shards' names. Images and text are separate, so that a blend can weight them.
SPLIT_PARTS = {"train": "train/", "train_image": "train/image-", "train_text": "train/text-", "val": "val/"}


class TooManyRejectsError(ValueError):
    """More records were skipped than `--max-skip-ratio` allows, or no training record is left; the work folder stays.

    Args:
        message: One sentence for the user.
        reports: What became of the records of each split.
    """

    def __init__(self, message: str, reports: dict[str, SplitReport]) -> None:
        super().__init__(message)
        self.reports = reports


def prepare(
    output: str | Path,
    train: Sequence[str | Path],
    valid: Sequence[str | Path] = (),
    *,
    source_format: str = "llava",
    image_root: str | Path = ".",
    image_files: Sequence[str | Path] = (),
    valid_fraction: float = 0.0,
    samples_per_shard: int = 1000,
    max_skip_ratio: float = 0.1,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, SplitReport]:
    """Writes shards, with everything that energon needs, to `output`, which can then be given as `--data-path`.

    Args:
        output: Folder to create.
        train: Files of training records.
        valid: Files of validation records.
        source_format: Format of the records, one of `FORMATS`.
        image_root: Folder that the records' image paths start from.
        image_files: Files of images by id, for formats that have such files.
        valid_fraction: Share of the training records to use for validation, chosen by a hash of their content.
        samples_per_shard: Records per shard, before any are skipped.
        max_skip_ratio: Largest share of the records that may be skipped.
        workers: Number of processes that read images and write shards.
        overwrite: Whether to replace shards in `output`.
        progress: Whether to show progress bars.

    Returns:
        Split (`train`, `val`) -> what became of its records. The skipped records are listed in `output/rejects.jsonl`,
        with their reasons.

    Raises:
        TooManyRejectsError: More than `max_skip_ratio` of the records cannot be used, or no training record is left.
        ValueError: An argument is wrong, or a file cannot be read.
    """
    output, image_root = Path(output), Path(image_root)
    _check_arguments(image_root, source_format, image_files, valid_fraction, samples_per_shard, max_skip_ratio, workers)
    arguments = {
        "layout": LAYOUT,
        "--format": source_format,
        "--train": [_digest(path) for path in train],
        "--valid": [_digest(path) for path in valid],
        "--image-root": [str(image_root), str(image_root.resolve())],
        "--image-files": [[str(Path(path).resolve()), _size(path)] for path in image_files],
        "--valid-fraction": valid_fraction,
        "--samples-per-shard": samples_per_shard,
    }
    work = output / WORK
    reports = _claim(output, arguments, overwrite)
    if reports is not None:
        _clean_up(work)
        return reports
    bar = functools.partial(tqdm, disable=not progress, dynamic_ncols=True)
    try:
        plan = functools.partial(_plan, train, valid, source_format, image_files, valid_fraction, samples_per_shard)
        shards = _load_plan(work) or plan(work, bar)
        _write_shards(output, image_root, shards, workers, bar)
        reports = _collect(output, shards)
        _check_kept(output, reports, max_skip_ratio)
        _write_index(output, [shard.name for shard in shards if (output / shard.name).exists()], bar)
    except OSError as error:
        raise ValueError(
            f"--output {output} cannot be written ({error}): fix that and run the command again."
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            f"A worker process died, perhaps out of memory (--workers {workers}): the same command continues from "
            "here, with fewer --workers if necessary."
        ) from error
    finished = {split: vars(report) for split, report in reports.items()}
    write_whole(work / "arguments.json", json.dumps(arguments | {"finished": finished}))
    _clean_up(work)
    return reports


def _clean_up(work: Path) -> None:
    """Removes the work folder of a finished run, last the file that says that the run is finished."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "arguments.json":
            path.unlink()
    (work / "arguments.json").unlink()
    work.rmdir()


def _check_arguments(
    image_root: Path,
    source_format: str,
    image_files: Sequence[str | Path],
    valid_fraction: float,
    samples_per_shard: int,
    max_skip_ratio: float,
    workers: int,
) -> None:
    if source_format not in FORMATS:
        raise ValueError(f"--format {source_format} is unknown: choose one of {', '.join(FORMATS)}.")
    if FORMATS[source_format].needs_images and not image_files:
        raise ValueError(f"--format {source_format} has its images in separate files: give --image-files.")
    if image_files and not FORMATS[source_format].needs_images:
        raise ValueError(f"--image-files is not for --format {source_format}: its images are below --image-root.")
    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root} is not a folder.")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"--valid-fraction {valid_fraction} is not in [0, 1).")
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {samples_per_shard} must be at least 1.")
    if not 0 <= max_skip_ratio <= 1:
        raise ValueError(f"--max-skip-ratio {max_skip_ratio} is not in [0, 1].")
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")


def _digest(path: str | Path) -> str:
    """Returns a hash of a file of records: a run continues only with the same records."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"The records {path} cannot be read ({error}).") from error


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise ValueError(f"--image-files {path} cannot be read ({error}).") from error


def _claim(output: Path, arguments: dict[str, Any], overwrite: bool) -> dict[str, SplitReport] | None:
    """Creates the work folder, or finds the work folder of an earlier run with the same arguments.

    A folder with other shards is emptied with `overwrite`, and refused without.

    Returns:
        The reports of the same run if only its clean-up is left to do, else None.
    """
    work, note = output / WORK, output / WORK / "arguments.json"
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder.")
    before = json.loads(note.read_text()) if note.exists() else None
    finished = None if before is None else before.pop("finished", None)
    if before == arguments and finished is not None:
        return {split: SplitReport.from_json(report) for split, report in finished.items()}
    if before == arguments and not (overwrite and (work / "stopped").exists()):
        return None
    if before is not None and not overwrite:
        changed = ", ".join(name for name in arguments if before.get(name) != arguments[name])
        raise ValueError(
            f"--output {output} holds an unfinished run with other arguments or records ({changed}): give another "
            "folder, or --overwrite."
        )
    if (output / META).exists() and not overwrite:
        raise ValueError(f"--output {output} holds prepared shards already: give another folder, or --overwrite.")
    old = [path.relative_to(output) for split in ("train", "val") for path in (output / split).glob("*.tar")]
    if old and before is None and not (output / META).exists():
        raise ValueError(f"--output {output} holds {old[0]}, which this program did not write: give another folder.")
    for name in ("done", "partial"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if overwrite:
        _clear(output)
    write_whole(note, json.dumps(arguments))
    return None


def _clear(output: Path) -> None:
    """Removes everything that this program wrote; a later run knows the folder even if this is killed midway."""
    write_whole(output / WORK / "arguments.json", "{}")
    shutil.rmtree(output / META, ignore_errors=True)
    for path in (path for split in ("train", "val") for path in (output / split).glob("*.tar*")):
        path.unlink()
    for path in [*(output / WORK).glob("*.jsonl"), *(output / WORK / "done").iterdir()]:
        path.unlink()
    for name in ("plan.json", "stopped"):
        (output / WORK / name).unlink(missing_ok=True)


def _load_plan(work: Path) -> list[Shard] | None:
    plan = work / "plan.json"
    return [Shard(**shard) for shard in json.loads(plan.read_text())] if plan.exists() else None


def _plan(
    train: Sequence[str | Path],
    valid: Sequence[str | Path],
    source_format: str,
    image_files: Sequence[str | Path],
    valid_fraction: float,
    size: int,
    work: Path,
    bar: Callable[..., tqdm],
) -> list[Shard]:
    """Reads all records once, one at a time, into line files; a record's key is its number among its flag's records."""
    files: dict[tuple[str, str], RecordFile] = {}
    paths = [Path(path) for path in (*train, *valid)]
    total = sum(map(_size, (*paths, *image_files)))
    with bar(total=total, unit="B", unit_scale=True, desc="reading records") as progress:
        images = Base64Images(image_files, progress.update) if image_files else None
        for option, names in (("train", train), ("val", valid)):
            for number, record in enumerate(_read_all(names, source_format, images, progress.update)):
                split = "val" if option == "train" and _is_for_validation(record, valid_fraction) else option
                # Validation data keeps its order, because validation may end before the last record.
                kind = "shard" if split == "val" else "image" if record.images else "text"
                if (split, kind) not in files:
                    files[split, kind] = RecordFile(work, split, kind, size)
                files[split, kind].add(f"{option}_{number:09d}", record)
    for file in files.values():
        file.close()
    shards = [shard for place in sorted(files) for shard in files[place].shards]
    write_whole(work / "plan.json", json.dumps([dataclasses.asdict(shard) for shard in shards]))
    return shards


def _read_all(
    paths: Sequence[str | Path], source_format: str, images: Base64Images | None, advance: Callable[[int], Any]
) -> Iterator[SourceRecord | Unreadable]:
    """Yields all records of some files; `advance` is called with the number of bytes read since its last call."""
    for path in paths:
        with Path(path).open("rb") as file:
            position = 0
            try:
                for record in read_source(file, source_format, images):
                    yield record
                    advance(file.tell() - position)
                    position = file.tell()
            except ValueError as error:
                raise ValueError(f"The records {path} cannot be read as --format {source_format}: {error}.") from error


def _is_for_validation(record: SourceRecord | Unreadable, fraction: float) -> bool:
    """Chooses a record for validation by a hash of its content, independent of order and of the other records."""
    if fraction == 0:
        return False
    digest = hashlib.sha256(json.dumps(record.data, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _write_shards(output: Path, image_root: Path, shards: list[Shard], workers: int, bar: Callable[..., tqdm]) -> None:
    """Writes the shards that do not exist yet."""
    shutil.rmtree(output / WORK / "partial")
    (output / WORK / "partial").mkdir()
    for shard in shards:
        (output / shard.name).parent.mkdir(exist_ok=True)
    missing = [shard for shard in shards if not (output / WORK / shard.note).exists()]
    total, left = (sum(shard.count for shard in group) for group in (shards, missing))
    write = functools.partial(write_shard, output, image_root)
    with (
        _pool(min(workers, len(missing))) as run,
        bar(total=total, initial=total - left, unit="record", desc="writing shards") as progress,
    ):
        for count in run(write, missing):
            progress.update(count)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields a `map` that runs in this process or in worker processes; results arrive in order of completion."""
    if workers <= 1:
        yield map
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:

        def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            futures: list[Future[Any]] = [pool.submit(function, item) for item in items]
            return (future.result() for future in as_completed(futures))

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Makes a worker process end when the program is killed, and leaves Ctrl-C to the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _collect(output: Path, shards: list[Shard]) -> dict[str, SplitReport]:
    """Adds up what became of the records, and writes the list of the skipped records."""
    reports = {split: SplitReport() for split in dict.fromkeys(["train", *(shard.split for shard in shards)])}
    partial = output / WORK / "rejects.jsonl"
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as rejects:
        for shard in shards:
            note = json.loads((output / WORK / shard.note).read_text())
            reports[shard.split].add(note)
            rejects.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in note["rejected"])
    partial.replace(output / "rejects.jsonl")
    return reports


def _check_kept(output: Path, reports: dict[str, SplitReport], max_skip_ratio: float) -> None:
    left_out = sum(report.rejected.total() for report in reports.values())
    total = left_out + sum(report.kept for report in reports.values())
    details = f"{output / 'rejects.jsonl'} says why, record by record"
    if left_out > max_skip_ratio * total or reports["train"].kept == 0:
        (output / WORK / "stopped").touch()
    if reports["train"].kept == 0:
        raise TooManyRejectsError(f"No training record could be used; {details}.", reports)
    if left_out > max_skip_ratio * total:
        raise TooManyRejectsError(
            f"{left_out:,} of {total:,} records cannot be used, more than --max-skip-ratio {max_skip_ratio}; {details}."
            " If that is expected, run the same command with a higher --max-skip-ratio; if files have been fixed, with "
            "--overwrite.",
            reports,
        )


def _write_index(output: Path, names: list[str], bar: Callable[..., tqdm]) -> None:
    """Lets energon index the shards, and writes which split each shard is in and how samples are read."""
    shutil.rmtree(output / META, ignore_errors=True)
    for split in ("train", "val"):  # the index of each shard, and what energon leaves of an index when it is killed
        for path in [*(output / split).glob("*.tar.idx"), *(output / split).glob(".*")]:
            path.unlink()
    parts = [(part, pattern) for part, pattern in SPLIT_PARTS.items() if any(n.startswith(pattern) for n in names)]
    with bar(total=len(names), unit="shard", desc="index") as progress:

        def advance(steps: Iterator[int], total: int) -> Iterator[int]:
            for step in steps:
                progress.update()
                yield step

        guard = threading.Event()  # energon's process must end with this one too; the hook lives as long as the object
        register_after_fork(guard, lambda _: _end_with_parent())
        with contextlib.redirect_stdout(io.StringIO()):  # energon prints each step
            # One process, so that the index has the samples in the same order each time.
            BaseWebdatasetFactory.prepare_dataset(
                output, names, split_parts_patterns=parts, workers=1, progress_fn=advance
            )
    meta = output / META
    with (meta / "index.sqlite").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # energon names the index at random; the same index should have the same name.
    (meta / "index.uuid").write_text(str(uuid.uuid5(uuid.NAMESPACE_OID, digest)))
    partial = output / WORK / "dataset.yaml"
    partial.write_text(yaml.safe_dump(DATASET, sort_keys=False), encoding="utf-8")
    partial.replace(meta / "dataset.yaml")
