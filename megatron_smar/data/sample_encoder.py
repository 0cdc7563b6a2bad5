# SPDX-License-Identifier: Apache-2.0
"""From segments and image files to a sample, for training and for evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_smar.data.batch import EncodedSample
from megatron_smar.data.conversations import Segment, tokenize_segments
from megatron_smar.data.images import read_each, read_size
from megatron_smar.data.rejects import SampleError
from megatron_smar.data.tiling import ImageProcessor, join_tiles
from megatron_smar.data.tokens import TextEncoder


@dataclass(frozen=True)
class SampleEncoder:
    """Converts segments and image files to tokens and tiles.

    Attributes:
        text: Encodes text to token ids.
        images: Splits images into tiles.
        tokens_per_tile: Number of vision tokens per tile.
        seq_length: Maximum number of positions of a sample.
    """

    text: TextEncoder
    images: ImageProcessor
    tokens_per_tile: int
    seq_length: int

    def tokenize(
        self, segments: Sequence[Segment], files: Sequence[bytes], kinds: Sequence[str] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Returns token ids, with the placeholders of the images, and for each id whether it is a training target.

        Args:
            segments: The segments, from `record_segments`.
            files: The image files, in the order of the `<image>` tags; only their headers are read.
            kinds: The modality of each image (`fields.image_modalities`); None where all are vision.

        Raises:
            SampleError: An image cannot be read or is of an unknown kind, or the sample does not fit into --seq-length.
        """
        lengths = [self.tokens_per_tile * self.images.count_tiles(*size) for size in read_each(files, read_size)]
        ids, targets = tokenize_segments(segments, self.text, lengths, kinds)
        # Each position predicts the next one, so that n + 1 tokens take n positions.
        if len(ids) - 1 > self.seq_length:
            raise SampleError("too_long", f"{len(ids) - 1} positions, but --seq-length is {self.seq_length}")
        return ids, targets

    def inputs(self, ids: Sequence[int], targets: Sequence[bool]) -> dict[str, Tensor]:
        """Returns `input_ids`, `labels` and `loss_mask`, each [n], of n + 1 tokens: each position predicts the next."""
        # Through numpy, because torch takes several times as long for a list.
        tokens = torch.from_numpy(np.array(ids, dtype=np.int64))
        mask = torch.from_numpy(np.array(targets[1:], dtype=np.float32))
        return {"input_ids": tokens[:-1], "labels": tokens[1:], "loss_mask": mask}

    def tiles(self, files: Sequence[bytes]) -> Tensor:
        """Returns the images' tiles, [tiles, 3, H, W] uint8.

        Raises:
            SampleError: An image cannot be read.
        """
        tiles = read_each(files, self.images) or [self.images.empty()]
        return tiles[0] if len(tiles) == 1 else join_tiles(tiles)

    def encode(
        self, key: str, segments: Sequence[Segment], files: Sequence[bytes], kinds: Sequence[str] | None = None
    ) -> EncodedSample:
        """Returns a full sample, with its answers as targets; the arguments are `tokenize`'s, with the sample's key."""
        return self._sample(key, self.inputs(*self.tokenize(segments, files, kinds)), files)

    def prompt(
        self, key: str, segments: Sequence[Segment], files: Sequence[bytes], kinds: Sequence[str] | None = None
    ) -> EncodedSample:
        """Returns a prompt, all of whose n tokens are input: the last one predicts the answer's first."""
        ids = torch.tensor(self.tokenize(segments, files, kinds)[0])
        return self._sample(key, {"input_ids": ids, "labels": ids, "loss_mask": torch.zeros(len(ids))}, files)

    def _sample(self, key: str, inputs: dict[str, Tensor], files: Sequence[bytes]) -> EncodedSample:
        tiles = self.tiles(files)
        return EncodedSample(__key__=key, __restore_key__=(), pixel_values=tiles, num_images=len(files), **inputs)
