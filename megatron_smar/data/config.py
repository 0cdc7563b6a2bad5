# SPDX-License-Identifier: Apache-2.0
"""What is read, and how it becomes micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_smar.data.conversations import get_template
from megatron_smar.data.metadataset import check_sources
from megatron_smar.data.packing import pack
from megatron_smar.data.paths import check_data_path
from megatron_smar.data.tiling import ImageConfig
from megatron_smar.modalities import Modalities


@dataclass
class DataConfig:
    """What is read and how it becomes micro-batches.

    Args:
        data_path: Folder of prepared shards (``--data-path``); its ``train`` split is used.
        seq_length: Most positions of a sample; longer ones are rejected, never cut.
        micro_batch_size: Rows of a micro-batch.
        valid_data_path: Where the ``val`` split is read (``--valid-data-path``); None is `data_path`.
        template: Conversation template.
        modalities: The run's table of modalities (``--image-modalities``).
        tokens_per_tile: Vision tokens of one image tile.
        image: How images become tiles.
        pad_to: Pad every micro-batch to this many positions; None pads to its longest sample.
        pad_to_multiple_of: Round the padded length up to a multiple of this, e.g. for sequence parallelism.
        packing_buffer_size: Samples of a worker among which those that share a sequence are chosen
            (``--packing-buffer-size``); None does not pack.
        packing_max_tiles: Most image tiles of a pack (``--packing-max-tiles``); None for no limit.
        packing_multiple_of: Round each sample's length in a pack up to a multiple of this, for context parallelism.
        text_only_ratio: Share of samples without images, held exactly (``--text-only-ratio``); None takes the data as
            it is.
        num_workers: Worker processes of one loader; 0 loads in the training process.
        shuffle_buffer_size: Samples among which the next one is drawn, per worker.
        max_samples_per_sequence: Longest run of samples read from one place of a shard; None is a whole shard.
        seed: Seed of the order of samples.
        verify_images: Pipeline stages that need no pixels decode images all the same, so that all stages reject the
            same damaged ones. Without it those stages read headers only, and an image damaged behind its header ends
            the run; shards made by ``tools/data/prepare.py`` have none.
        rejects_dir: Folder in which rejected samples are listed; None lists none.
        max_skip_ratio: The run ends when more than this share of the samples is rejected (``--max-skip-ratio``); 1 lets
            all pass.
        max_consecutive_rejects: So many rejected samples in a row end the run, whatever their share.
    """

    data_path: str
    seq_length: int
    micro_batch_size: int
    valid_data_path: str | None = None
    template: str = "mistral"
    modalities: Modalities = field(default_factory=Modalities)
    tokens_per_tile: int = 256
    image: ImageConfig = field(default_factory=ImageConfig)
    pad_to: int | None = None
    pad_to_multiple_of: int = 1
    packing_buffer_size: int | None = None
    packing_max_tiles: int | None = None
    packing_multiple_of: int = 1
    text_only_ratio: float | None = None
    num_workers: int = 2
    shuffle_buffer_size: int = 1000
    max_samples_per_sequence: int | None = 100
    seed: int = 1234
    verify_images: bool = True
    rejects_dir: str | None = None
    max_skip_ratio: float = 0.1
    max_consecutive_rejects: int = 1000

    def __post_init__(self) -> None:
        """Check the values and that the data is there."""
        for name in (
            "seq_length",
            "micro_batch_size",
            "tokens_per_tile",
            "pad_to_multiple_of",
            "max_consecutive_rejects",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be at least 1.")
        for name in ("num_workers", "shuffle_buffer_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must not be negative.")
        if self.pad_to is not None and self.pad_to < self.seq_length:
            raise ValueError(
                f"--seq-length is {self.seq_length}, and a padded length of {self.pad_to} would not hold its samples."
            )
        padded = self.pad_to or self.seq_length
        if padded % self.pad_to_multiple_of:
            raise ValueError(
                f"--seq-length {padded} is no multiple of {self.pad_to_multiple_of}, which tensor and context "
                f"parallelism need; give {padded + -padded % self.pad_to_multiple_of}."
            )
        self._check_packing()
        tiles = self.image.max_tiles + (self.image.use_thumbnail and self.image.max_tiles > 1)
        if tiles * self.tokens_per_tile > self.seq_length:
            raise ValueError(
                f"--max-tiles {self.image.max_tiles} lets an image have {tiles} tiles of {self.tokens_per_tile} tokens "
                f"each, more than --seq-length {self.seq_length} takes: lower the one or raise the other."
            )
        if self.text_only_ratio is not None and not 0 < self.text_only_ratio < 1:
            raise ValueError(
                f"--text-only-ratio {self.text_only_ratio} is no share between 0 and 1 (the paper's is 0.025): leave "
                "it out to take the data as it is."
            )
        if not 0 <= self.max_skip_ratio <= 1:
            raise ValueError(f"--max-skip-ratio {self.max_skip_ratio} is no share: give one from 0 to 1.")
        get_template(self.template)
        for path, flag in ((self.data_path, "--data-path"), (self.valid_data_path, "--valid-data-path")):
            if path is not None:
                check_data_path(path, flag)
                check_sources(path, flag)

    def _check_packing(self) -> None:
        if self.packing_buffer_size is None:
            if self.packing_max_tiles is not None:
                raise ValueError("--packing-max-tiles limits packs: give --packing-buffer-size too, or leave it out.")
            return
        try:
            pack([1], [0], 1)
        except ImportError as error:
            raise ValueError(f"--packing-buffer-size {self.packing_buffer_size}: {error}") from error
        if self.packing_buffer_size < 1:
            raise ValueError(f"--packing-buffer-size {self.packing_buffer_size} must be at least 1.")
        if self.micro_batch_size != 1:
            raise ValueError(
                f"--micro-batch-size {self.micro_batch_size} with --packing-buffer-size: a micro-batch is one pack; "
                "give --micro-batch-size 1 and a longer --seq-length."
            )
        if self.packing_max_tiles is not None and self.packing_max_tiles < 1:
            raise ValueError(f"--packing-max-tiles {self.packing_max_tiles} must be at least 1.")
        if self.seq_length % self.packing_multiple_of:
            raise ValueError(
                f"--seq-length {self.seq_length} is no multiple of {self.packing_multiple_of} (2 x "
                "--context-parallel-size), to which samples in a pack are padded: choose it so."
            )


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")
