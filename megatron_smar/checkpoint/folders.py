# SPDX-License-Identifier: Apache-2.0
"""Output folders that are written completely or not at all, and the files copied into them besides the weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WEIGHT_FILES: tuple[str, ...] = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
)
WEIGHT_FILES += ("*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.npz")
PICKLES = ("*.pkl", "*.pickle", "*.joblib", "*.npy")  # opening these can run code


class ConversionError(ValueError):
    """A checkpoint does not fit its architecture, or cannot be written; nothing was written."""


@contextlib.contextmanager
def whole_or_nothing(output: Path, needed: int) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `output` only when everything in it has been written.

    Args:
        output: The folder's final name.
        needed: Bytes that will be written.

    Raises:
        ConversionError: The folder exists already, or the disk has too little room.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"--output {output} exists already; give a new folder.")
    partial_output = output.with_name(output.name + ".partial")
    try:
        if partial_output.exists():
            shutil.rmtree(partial_output)  # left by an interrupted conversion
        free = shutil.disk_usage(next(place for place in output.absolute().parents if place.exists())).free
        if free < needed:
            raise ConversionError(
                f"--output {output} needs {needed / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free; make room "
                "or give a folder on another disk."
            )
        partial_output.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(f"--output {output} cannot be written ({error}); give another folder.") from error
    try:
        yield partial_output
        if output.exists():
            output.rmdir()  # empty
        os.rename(partial_output, output)
    except BaseException:
        shutil.rmtree(partial_output, ignore_errors=True)
        raise


def copy_companions(origins: Iterable[Path], folder: Path) -> None:
    """Copies tokenizer, processor and all other files that are neither weights, nor code, nor config.json.

    Args:
        origins: Folders or files to copy from; of several files with one name, the first is copied.
        folder: Folder to copy to.
    """
    for origin in origins:
        for path in sorted(origin.iterdir()) if origin.is_dir() else [origin]:
            is_weight = any(path.match(pattern) for pattern in (*WEIGHT_FILES, *PICKLES))
            is_excluded = is_weight or path.suffix == ".py" or path.name == "config.json"
            if path.is_file() and not is_excluded and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
                if path.suffix == ".json":
                    _remove_auto_map(folder / path.name)


def without_code(content: Any) -> Any:
    """Returns a Hugging Face JSON without `auto_map`, which names code to run: code is not copied."""
    if isinstance(content, dict):
        return {name: without_code(value) for name, value in content.items() if name != "auto_map"}
    return content


def _remove_auto_map(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # the error is reported where the file is read
    if (kept := without_code(content)) != content:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def first_few(names: Iterable[str]) -> str:
    """Returns the first five names and the number of the others, for an error message."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
