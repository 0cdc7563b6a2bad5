# SPDX-License-Identifier: Apache-2.0
"""What csrc/packing.cpp offers to packing.py."""

import numpy as np

def pack(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, window: int
) -> tuple[np.ndarray, np.ndarray]: ...
def lists(order: np.ndarray, offsets: np.ndarray) -> list[list[int]]: ...
