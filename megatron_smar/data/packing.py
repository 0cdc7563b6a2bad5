# SPDX-License-Identifier: Apache-2.0
"""Sequence packing: best-fit decreasing over tokens and image tiles, in C++ (csrc/packing.cpp)."""

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

    Best-fit decreasing: the samples of a window are placed by descending tokens, ties by index. Each goes into the open
    pack of its window that it fits into and that has the least room for tokens; among several, into the pack with the
    least room for tiles; among those, into the pack that last received a sample. If it fits into no pack, it opens a
    new one. The packs depend only on the arguments.

    Args:
        tokens: Positions of each sample, vision tokens included, [n].
        tiles: Image tiles of each sample, [n].
        max_tokens: Maximum number of tokens in a pack, up to 4,194,304.
        max_tiles: Maximum number of tiles in a pack; None for no limit.
        window: Number of consecutive samples that are packed together (the last window may be smaller); None for all.

    Returns:
        The packs, ordered by their first index, each a list of ascending indices; every index occurs once.

    Raises:
        ValueError: A single sample exceeds a limit, or an argument is invalid.
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
    """Does the same as `pack`, but returns arrays: pack p is `order[offsets[p] : offsets[p + 1]]`.

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
            f"tokens has {len(token_counts)} samples, but tiles has {len(tile_counts)}: give both for each sample."
        )
    if max_tiles is None:
        tile_counts, max_tiles = np.zeros_like(tile_counts), 0
    return _native().pack(token_counts, tile_counts, max_tokens, max_tiles, window or max(1, len(token_counts)))


def _counts(name: str, values: Sequence[int] | np.ndarray, least: int, most: int | None) -> np.ndarray:
    """Checks an argument of `pack` and returns it as int64 [n], without a copy if it is that already."""
    counts = np.asarray(values)
    if counts.size == 0:
        counts = counts.astype(np.int64)
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise ValueError(f"{name} has shape {counts.shape} and type {counts.dtype}: give one whole number per sample.")
    wrong = counts < least if most is None else (counts < least) | (counts > most)
    if wrong.any():
        sample = int(wrong.argmax())
        bounds = f"at least {least}" if most is None else f"{least} to {most}, since nothing is split or truncated"
        raise ValueError(f"Sample {sample} has {counts[sample]} {name}, but a pack takes samples of {bounds}.")
    return np.ascontiguousarray(counts, dtype=np.int64)


def _native() -> ModuleType:
    # Imported here, because runs without packing do not need it.
    try:
        from megatron_smar.data import _packing
    except ImportError as error:
        raise ImportError(
            f"The sequence packer is not built ({error}): reinstall megatron_smar with a C++17 compiler on the PATH, "
            "by `pip install .` or, in a checkout, `pip install -e .`."
        ) from error
    return _packing
