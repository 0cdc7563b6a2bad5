# SPDX-License-Identifier: Apache-2.0
"""Folders that are written whole or not at all, and what is copied into them beside the weights."""

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
PICKLES = ("*.pkl", "*.pickle", "*.joblib", "*.npy")  # which run code when they are opened


class ConversionError(ValueError):
    """A checkpoint does not fit its architecture, or cannot be written; nothing was."""


@contextlib.contextmanager
def whole_or_nothing(output: Path, needed: int) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it has been written.

    Args:
        output: Its name.
        needed: Bytes that will be written.

    Raises:
        ConversionError: It exists already, or the disk has less room.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"--output {output} exists already; give a new folder.")
    partial_output = output.with_name(output.name + ".partial")
    try:
        if partial_output.exists():
            shutil.rmtree(partial_output)  # an interrupted conversion left it
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
    """Copies tokenizer, processor and whatever else is no weight, no code and no config.

    Args:
        origins: Folders or files; the first that has a file gives it.
        folder: Where to.
    """
    for origin in origins:
        for path in sorted(origin.iterdir()) if origin.is_dir() else [origin]:
            is_weight = any(path.match(pattern) for pattern in (*WEIGHT_FILES, *PICKLES))
            is_other = is_weight or path.suffix == ".py" or path.name == "config.json"
            if path.is_file() and not is_other and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
                if path.suffix == ".json":
                    _forget_code(folder / path.name)


def without_code(content: Any) -> Any:
    """A Hugging Face JSON without any `auto_map`: it names code to be run, and code is not taken along."""
    if isinstance(content, dict):
        return {name: without_code(value) for name, value in content.items() if name != "auto_map"}
    return content


def _forget_code(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # whoever reads it says so
    if (kept := without_code(content)) != content:
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def some(names: Iterable[str]) -> str:
    """The first of many names, for a sentence."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
