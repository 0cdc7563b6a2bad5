# SPDX-License-Identifier: Apache-2.0
"""Which samples share a sequence: best-fit decreasing over tokens and image tiles, in C++ (csrc/packing.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

MOST_TOKENS = 1 << 22  # the C++ code keeps a table with one entry per token of room


def pack(
    tokens: Sequence[int] | np.ndarray,
    tiles: Sequence[int] | np.ndarray,
    max_tokens: int,
    max_tiles: int | None = None,
    window: int | None = None,
) -> list[list[int]]:
    """Distributes samples over packs, each of which holds at most `max_tokens` tokens and `max_tiles` tiles.

    Best-fit decreasing: the samples of a window are taken by descending tokens, equal ones by index. Each goes into the
    open pack of its window that holds it and has the least token room; of several into the one with the least tile
    room; of those into the one that last received a sample. If no pack holds it, it opens one. The packs depend on
    nothing but the arguments.

    Args:
        tokens: Positions of each sample, vision tokens included, [n].
        tiles: Image tiles of each sample, [n].
        max_tokens: Most tokens of a pack, up to 4,194,304.
        max_tiles: Most tiles of a pack; None for no limit.
        window: Consecutive samples that are packed together, the last of them maybe fewer; None for all.

    Returns:
        The packs by their first index, each a list of ascending indices; every index once.

    Raises:
        ValueError: A sample exceeds a limit by itself, or an argument is not what it should be.
        ImportError: The C++ module has not been built.
    """
    order, offsets = pack_flat(tokens, tiles, max_tokens, max_tiles, window)
    return _native().lists(order, offsets)


def pack_flat(
    tokens: Sequence[int] | np.ndarray,
    tiles: Sequence[int] | np.ndarray,
    max_tokens: int,
    max_tiles: int | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `pack` does without making lists: pack p is `order[offsets[p] : offsets[p + 1]]`.

    Returns:
        order [n] and offsets [packs + 1], both int64.
    """
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} holds no sample: give 1 or more.")
    if max_tokens > MOST_TOKENS:
        raise ValueError(f"max_tokens {max_tokens} is more than packing has tables for: give {MOST_TOKENS} or less.")
    if max_tiles is not None and max_tiles < 0:
        raise ValueError(f"max_tiles {max_tiles} is below 0: give a number of tiles, or None for no limit.")
    token_counts = _counts("tokens", tokens, 1, max_tokens)
    tile_counts = _counts("tiles", tiles, 0, max_tiles)
    if len(token_counts) != len(tile_counts):
        raise ValueError(
            f"tokens are of {len(token_counts)} samples, but tiles of {len(tile_counts)}: give both of each."
        )
    if max_tiles is None:
        tile_counts, max_tiles = np.zeros_like(tile_counts), 0
    return _native().pack(token_counts, tile_counts, max_tokens, max_tiles, window or max(1, len(token_counts)))


def _counts(name: str, values: Sequence[int] | np.ndarray, least: int, most: int | None) -> np.ndarray:
    """Returns what `pack` was given as int64 [n], without a copy if it is that, after checking every value."""
    counts = np.asarray(values)
    if counts.size == 0:
        counts = counts.astype(np.int64)
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {counts.shape} and type {counts.dtype}: give one whole number per sample.")
    wrong = counts < least if most is None else (counts < least) | (counts > most)
    if wrong.any():
        sample = int(wrong.argmax())
        bounds = f"at least {least}" if most is None else f"{least} to {most}, since nothing is split or cut"
        raise ValueError(f"Sample {sample} has {counts[sample]} {name}, but a pack takes samples of {bounds}.")
    return np.ascontiguousarray(counts, dtype=np.int64)


def _native() -> ModuleType:
    # Here and not above: whoever does not pack can do without it.
    try:
        from megatron_smar.data import _packing
    except ImportError as error:
        raise ImportError(
            f"The sequence packer is not built ({error}): reinstall megatron_smar with a C++17 compiler on the PATH, "
            "by `pip install .` or, in a checkout, `pip install -e .`."
        ) from error
    return _packing
