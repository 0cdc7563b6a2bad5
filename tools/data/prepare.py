# SPDX-License-Identifier: Apache-2.0
"""Turn LLaVA-style records and their images into the shards that training reads.

Records are a JSON list or JSON lines. Each has `conversations` (turns with `from` human/gpt/system and `value`) with
one `<image>` tag per image and `image` (a path or a list of paths; none for text), or it has a plain `text`:

  {"id": "1", "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A cat."}]}
  {"id": "2", "text": "Plain text to learn from."}

The same records and images always give the same shards.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from tqdm import tqdm
from webdataset import TarWriter

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.data.conversations import TEMPLATES, record_segments
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tiling import read_image

META = ".nv-meta"
DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {"format": "conversation"}}


@dataclass
class SplitReport:
    """What became of one split's records.

    Args:
        kept: Samples in the shards.
        images: Images in the shards.
        rejected: Reason -> number of records that were left out.
    """

    kept: int = 0
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Shard:
    """One shard to be written: its file and its records, each with its key."""

    path: Path
    records: list[tuple[str, Any]]


def prepare(
    output: str | Path,
    train: Sequence[str | Path],
    valid: Sequence[str | Path] = (),
    *,
    image_root: str | Path = ".",
    valid_fraction: float = 0.0,
    samples_per_shard: int = 1000,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, SplitReport]:
    """Write shards and everything energon needs beside them to `output`, which can then be given as ``--data-path``.

    Args:
        output: Folder to make.
        train: Files of training records.
        valid: Files of validation records.
        image_root: Folder that the records' image paths start from.
        valid_fraction: Share of the training records to take for validation, by their content.
        samples_per_shard: Records of one shard, before any is left out.
        workers: Processes that read images and write shards.
        overwrite: Replace shards that `output` holds.
        progress: Show a progress bar.

    Returns:
        Split (``train``, ``val``) -> what became of its records. Those left out are listed in
        ``output/rejects.jsonl``, with their reasons.

    Raises:
        ValueError: An argument is wrong, a file cannot be read, or no training record is left.
    """
    output, image_root = Path(output), Path(image_root)
    _check_arguments(output, image_root, valid_fraction, samples_per_shard, workers, overwrite)
    splits = _read_splits(train, valid, valid_fraction)
    for name in ("train", "val", META):
        shutil.rmtree(output / name, ignore_errors=True)
    shards = list(_plan_shards(output, splits, samples_per_shard))
    reports = {split: SplitReport() for split in splits}
    with (
        _pool(workers) as run,
        tqdm(total=sum(map(len, splits.values())), unit="record", disable=not progress, dynamic_ncols=True) as bar,
        (output / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        results = run(functools.partial(_write_shard, image_root), shards)
        for shard, (kept, images, rejected) in zip(shards, results, strict=True):
            report = reports[shard.path.parent.name]
            report.kept += kept
            report.images += images
            report.rejected.update(reject["reason"] for reject in rejected)
            rejects.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejected)
            bar.update(len(shard.records))
    if reports["train"].kept == 0:
        raise ValueError(f"No training record could be used; {output / 'rejects.jsonl'} says why, record by record.")
    _write_index(output, [shard.path for shard in shards if shard.path.exists()], workers)
    return reports


def _check_arguments(
    output: Path, image_root: Path, valid_fraction: float, samples_per_shard: int, workers: int, overwrite: bool
) -> None:
    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root} is not a folder.")
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"--valid-fraction {valid_fraction} is not in [0, 1).")
    if samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {samples_per_shard} must be at least 1.")
    if workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1.")
    if (output / META).exists() and not overwrite:
        raise ValueError(f"--output {output} holds prepared shards already: give another folder, or --overwrite.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder.")


def read_records(path: str | Path) -> list[Any]:
    """Read a JSON list or JSON lines; a line that is not JSON is kept as None, to be rejected by name.

    Raises:
        ValueError: The file cannot be read, or is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The records {path} cannot be read ({error}).") from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The records {path} are not a JSON list ({error}).") from error
    records = [_parse_line(line) for line in text.split("\n") if line.strip()]
    if not any(isinstance(record, dict) for record in records):
        raise ValueError(f"The records {path} are neither a JSON list nor JSON lines, or there are none.")
    return records


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_splits(
    train: Sequence[str | Path], valid: Sequence[str | Path], valid_fraction: float
) -> dict[str, list[tuple[str, Any]]]:
    """Return split -> records with their keys; a record's key is its number among all records of its option."""
    numbered = {
        name: [(f"{name}_{number:09d}", record) for number, record in enumerate(_chain_records(paths))]
        for name, paths in (("train", train), ("val", valid))
    }
    splits = {"train": [], "val": numbered["val"]}
    for key, record in numbered["train"]:
        splits["val" if _drawn(record, valid_fraction) else "train"].append((key, record))
    return {split: records for split, records in splits.items() if records or split == "train"}


def _chain_records(paths: Sequence[str | Path]) -> Iterator[Any]:
    for path in paths:
        yield from read_records(path)


def _drawn(record: Any, fraction: float) -> bool:
    """Draw a record for validation by its content, so that neither order nor further records change the draw."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _plan_shards(output: Path, splits: dict[str, list[tuple[str, Any]]], size: int) -> Iterator[Shard]:
    for split, records in splits.items():
        (output / split).mkdir(parents=True)
        for number, start in enumerate(range(0, len(records), size)):
            yield Shard(output / split / f"shard-{number:06d}.tar", records[start : start + size])


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Any]:
    """Yield a `map` that keeps the order and runs here or in worker processes."""
    if workers == 1:
        yield map
        return
    with multiprocessing.Pool(workers) as pool:
        yield pool.imap


def _write_shard(image_root: Path, shard: Shard) -> tuple[int, int, list[dict[str, str]]]:
    """Write one shard; return its samples, its images and the records left out of it."""
    kept = images = 0
    rejected = []
    with shard.path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
        for key, record in shard.records:
            try:
                files = _read_images(record, image_root)
            except SampleError as error:
                name = str(record.get("id", "")) if isinstance(record, dict) else ""
                rejected.append({"key": key, "id": name, "reason": error.reason, "message": error.message})
                continue
            tar.write({"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode(), **files})
            kept += 1
            images += len(files)
    if kept == 0:
        shard.path.unlink()
    return kept, images, rejected


def _read_images(record: Any, image_root: Path) -> dict[str, bytes]:
    """Check a record and its images; return the images as members of a sample, ``0.jpg``, ``1.png``, ..."""
    paths = record.get("image") if isinstance(record, dict) else None
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise SampleError("bad_record", "`image` is neither a path nor a list of paths")
    record_segments(record, TEMPLATES["mistral"], len(paths))
    files = {}
    for number, path in enumerate(paths):
        try:
            data = (image_root / path).read_bytes()
        except OSError as error:
            raise SampleError("missing_image", f"{image_root / path} cannot be read ({error.strerror})") from error
        read_image(data)  # a damaged one would otherwise be found by every run that reads it
        files[f"{number}.{Path(path).suffix.lower().lstrip('.') or 'img'}"] = data
    return files


def _write_index(output: Path, shards: list[Path], workers: int) -> None:
    """Let energon index the shards, and say which split each is in and how samples are read."""
    names = [path.relative_to(output).as_posix() for path in shards]
    splits = sorted({path.parent.name for path in shards}, key=("train", "val").index)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on each step
        BaseWebdatasetFactory.prepare_dataset(
            output,
            names,
            split_parts_patterns=[(split, f"{split}/.*") for split in splits],
            workers=min(workers, len(names)),
        )
    (output / META / "dataset.yaml").write_text(yaml.safe_dump(DATASET, sort_keys=False), encoding="utf-8")


def format_report(reports: dict[str, SplitReport]) -> str:
    """Return a table of what was kept and, by reason, what was not."""
    reasons = sorted({reason for report in reports.values() for reason in report.rejected})
    rows = [["split", "kept", "images", "left out", *reasons]]
    for split, report in reports.items():
        counts = [report.kept, report.images, report.rejected.total(), *(report.rejected[reason] for reason in reasons)]
        rows.append([split, *(f"{count:,}" for count in counts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    """Run `prepare` as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to make; give it as --data-path when training")
    parser.add_argument("--train", required=True, nargs="+", metavar="FILE", help="training records")
    parser.add_argument("--valid", default=[], nargs="+", metavar="FILE", help="validation records")
    parser.add_argument(
        "--valid-fraction", type=float, default=0.0, metavar="F", help="share of --train to validate on (default: 0)"
    )
    parser.add_argument(
        "--image-root", default=".", metavar="DIR", help="where the records' image paths start (default: here)"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="records of one shard (default: 1000)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --output holds")
    args = parser.parse_args()
    try:
        reports = prepare(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    print(format_report(reports))
    if any(report.rejected for report in reports.values()):
        print(f"Left-out records, with reasons: {Path(args.output) / 'rejects.jsonl'}")


if __name__ == "__main__":
    main()
