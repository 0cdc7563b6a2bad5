# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.reliability.manifest import Manifest, Places

_ITERATION = re.compile(r"iter_(\d{7,})")


def superfluous(steps: list[int], newest: int, config: ReliabilityConfig) -> list[int]:
    """Returns the steps whose checkpoints are to be deleted.

    Args:
        steps: The steps in the folder, all of whose checkpoints can be loaded.
        newest: The step that was just saved. Later steps are of a course that the run has left, by resuming from an
            earlier checkpoint; they are deleted too.
        config: The config, with --keep-last.
    """
    assert config.keep_last is not None
    own = sorted((step for step in steps if step <= newest), reverse=True)
    kept = set(own[: config.keep_last])
    kept |= {step for step in own if config.keep_every and step % config.keep_every == 0}
    return sorted(set(steps) - kept)


def delete_old(folder: Path, loader_folder: Path, newest: int, config: ReliabilityConfig) -> Iterator[str]:
    """Deletes superfluous checkpoints with their loader states, and yields the names of those deleted.

    A checkpoint that its manifest shows to be incomplete does not count as kept, so that the last valid one is never
    deleted. Nothing is deleted unless the newest one is complete.
    """
    found = {int(match[1]): path for path in folder.iterdir() if (match := _ITERATION.fullmatch(path.name))}
    complete = [step for step, path in found.items() if _is_complete(path, loader_folder / path.name)]
    if newest not in complete:
        return
    for step in superfluous(complete, newest, config):
        path = found[step]
        if path.is_symlink():
            continue  # somebody keeps it elsewhere
        # Renamed first: what an interrupted deletion leaves is no checkpoint.
        gone = path.with_name(f".{path.name}.deleted")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(loader_folder / path.name, ignore_errors=True)
        yield path.name


def _is_complete(path: Path, loader: Path) -> bool:
    try:
        manifest = Manifest.read(path)
    except (OSError, ValueError):
        return False
    if manifest is None:  # saved by Megatron alone, or by an older version
        return (path / ".metadata").is_file() and (path / "metadata.json").is_file()
    return next(manifest.size_problems(Places(path, loader)), None) is None
