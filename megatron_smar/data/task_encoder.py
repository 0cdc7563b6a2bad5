# SPDX-License-Identifier: Apache-2.0
"""From the shards' raw samples to micro-batches, as an energon task encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.energon import Cooker, CrudeSample, Sample, SkipSample, TaskEncoder, basic_sample_keys, stateless
from megatron.energon.edataclass import edataclass

from megatron_smar.data.batch import EncodedSample, VisionLanguageBatch, collate
from megatron_smar.data.conversations import Segment, get_template, record_segments, tokenize_segments
from megatron_smar.data.rejects import DataError, RejectLog, SampleError
from megatron_smar.data.tiling import ImageConfig, ImageProcessor, read_image, read_size
from megatron_smar.data.tokens import TextEncoder

_PREPARE = "make it with `python tools/data/prepare.py --train RECORDS.json --image-root IMAGES --output FOLDER`"


@dataclass
class DataConfig:
    """What is read and how it becomes micro-batches.

    Args:
        data_path: Folder of prepared shards (``--data-path``); its ``train`` split is used.
        seq_length: Most positions of a sample; longer ones are rejected, never cut.
        micro_batch_size: Rows of a micro-batch.
        valid_data_path: Where the ``val`` split is read (``--valid-data-path``); None is `data_path`.
        template: Conversation template.
        tokens_per_tile: Vision tokens of one image tile.
        image: How images become tiles.
        pad_to: Pad every micro-batch to this many positions; None pads to its longest sample.
        pad_to_multiple_of: Round the padded length up to a multiple of this, e.g. for sequence parallelism.
        num_workers: Worker processes of one loader; 0 loads in the training process.
        shuffle_buffer_size: Samples among which the next one is drawn, per worker.
        max_samples_per_sequence: Longest run of samples read from one place of a shard; None is a whole shard.
        seed: Seed of the order of samples.
        verify_images: Pipeline stages that need no pixels decode images all the same, so that all stages reject the
            same damaged ones. Without it those stages read headers only, and an image damaged behind its header ends
            the run; shards made by ``tools/data/prepare.py`` have none.
        rejects_dir: Folder in which rejected samples are listed; None lists none.
        max_consecutive_rejects: So many rejected samples in a row end the run.
    """

    data_path: str
    seq_length: int
    micro_batch_size: int
    valid_data_path: str | None = None
    template: str = "mistral"
    tokens_per_tile: int = 256
    image: ImageConfig = field(default_factory=ImageConfig)
    pad_to: int | None = None
    pad_to_multiple_of: int = 1
    num_workers: int = 2
    shuffle_buffer_size: int = 1000
    max_samples_per_sequence: int | None = 100
    seed: int = 1234
    verify_images: bool = True
    rejects_dir: str | None = None
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
                f"--pad-to {self.pad_to} is shorter than --seq-length {self.seq_length}, the longest sample kept."
            )
        padded = self.pad_to or self.seq_length
        if padded % self.pad_to_multiple_of:
            raise ValueError(
                f"The padded length {padded} is no multiple of {self.pad_to_multiple_of}, which the parallel layout "
                "needs: choose --seq-length (or --pad-to) so."
            )
        get_template(self.template)
        check_data_path(self.data_path, "--data-path")
        if self.valid_data_path is not None:
            check_data_path(self.valid_data_path, "--valid-data-path")


def check_data_path(path: str, flag: str) -> None:
    """Check that prepared shards, or an energon metadataset file, are at `path`.

    Raises:
        ValueError: They are not; the message names `flag` and how to make them.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{flag} {path} does not exist: {_PREPARE}.")
    if place.is_dir() and not (place / ".nv-meta" / "dataset.yaml").is_file():
        raise ValueError(f"{flag} {path} has no .nv-meta/dataset.yaml, so it holds no prepared shards: {_PREPARE}.")
    if place.is_file() and place.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{flag} {path} is neither a folder of shards nor an energon metadataset .yaml: {_PREPARE}.")


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


@edataclass
class RawSample(Sample):
    """A sample as it stands in the shard.

    Attributes:
        parts: Name behind the key (``json``, ``0.jpg``) -> content of that file.
    """

    parts: dict[str, bytes]


@stateless
def cook(sample: CrudeSample) -> RawSample:
    """Take a crude sample as it is; whatever is wrong with it is found when it is encoded, and counted there."""
    parts = {name: content for name, content in sample.items() if not name.startswith("__")}
    return RawSample(**basic_sample_keys(sample), parts=parts)


@dataclass(frozen=True)
class SampleTokenizer:
    """Segments and image files to ids.

    Args:
        encoder: Text to ids.
        images: Knows how many tiles an image gives.
        tokens_per_tile: Vision tokens of one tile.
        seq_length: Most positions of a sample.
    """

    encoder: TextEncoder
    images: ImageProcessor
    tokens_per_tile: int
    seq_length: int

    def __call__(self, segments: Sequence[Segment], files: Sequence[bytes]) -> tuple[list[int], list[bool]]:
        """Ids and whether each is to be learned, with as many placeholders as the images' tiles give.

        Raises:
            SampleError: An image cannot be read, or the whole does not fit into --seq-length.
        """
        lengths = [self.tokens_per_tile * self.images.count_tiles(*read_size(data)) for data in files]
        ids, targets = tokenize_segments(segments, self.encoder, lengths)
        # Each position predicts the next one, so that n + 1 tokens take n positions.
        if len(ids) - 1 > self.seq_length:
            raise SampleError("too_long", f"{len(ids) - 1} positions, but --seq-length is {self.seq_length}")
        return ids, targets


class ConversationTaskEncoder(TaskEncoder[RawSample, EncodedSample, VisionLanguageBatch, VisionLanguageBatch]):
    """Encodes conversations with images.

    Args:
        config: Data configuration.
        encoder: Text to ids.
        rejects: Where rejected samples are counted.
        decode_images: False on pipeline stages that need no pixels: `pixel_values` is then [0, 3, H, W], and
            everything else is as with it.
    """

    cookers = (Cooker(cook),)
    decoder = None  # our own decoding names what is wrong with an image

    def __init__(
        self, config: DataConfig, encoder: TextEncoder, rejects: RejectLog, *, decode_images: bool = True
    ) -> None:
        """Build the parts."""
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.rejects = rejects
        self.decode_images = decode_images
        self.template = get_template(config.template)
        self.images = ImageProcessor(config.image)
        self.tokenize = SampleTokenizer(encoder, self.images, config.tokens_per_tile, config.seq_length)

    @stateless
    def encode_sample(self, sample: RawSample) -> EncodedSample:
        """Encode one sample; one that cannot be used is recorded and left out.

        Raises:
            SkipSample: energon's sign to go on to the next sample.
            DataError: Nothing but unusable samples arrives.
        """
        try:
            encoded = self.encode(sample)
        except SampleError as error:
            self.rejects.add(sample.__key__, error)
            raise SkipSample from error
        self.rejects.accept()
        return encoded

    def encode(self, sample: RawSample) -> EncodedSample:
        """Encode one sample.

        Raises:
            SampleError: It cannot be used.
            DataError: An image is damaged, but other ranks could not see that.
        """
        record, files = _split_parts(sample.parts)
        ids, targets = self.tokenize(record_segments(record, self.template, len(files)), files)
        if not any(targets[1:]):
            raise SampleError("empty_conversation", "there is no token to learn")
        return EncodedSample.derive_from(
            sample,
            input_ids=torch.tensor(ids[:-1]),
            labels=torch.tensor(ids[1:]),
            loss_mask=torch.tensor(targets[1:], dtype=torch.float32),
            pixel_values=self._tiles(files, sample.__key__),
        )

    def _tiles(self, files: Sequence[bytes], key: str) -> torch.Tensor:
        try:
            if self.decode_images:
                return torch.cat([self.images.empty(), *map(self.images, files)])
            if self.config.verify_images:
                for data in files:
                    read_image(data)
        except SampleError as error:
            if self.config.verify_images:
                raise
            raise DataError(
                f"Sample {key} has a damaged image ({error.message}), which pipeline stages that read headers only "
                "cannot see and would not skip: let all stages verify images, or prepare the data with "
                "tools/data/prepare.py, which leaves such samples out."
            ) from error
        return self.images.empty()

    @stateless
    def batch(self, samples: list[EncodedSample]) -> VisionLanguageBatch:
        """Pad samples to a micro-batch; it always has `micro_batch_size` rows."""
        config = self.config
        longest = max(len(sample.input_ids) for sample in samples)
        length = config.pad_to or math.ceil(longest / config.pad_to_multiple_of) * config.pad_to_multiple_of
        return collate(samples, rows=config.micro_batch_size, length=length, pad_id=self.encoder.pad_id)


def _split_parts(parts: dict[str, bytes]) -> tuple[Any, list[bytes]]:
    """Return a sample's record and its image files in the order of their numbers."""
    if "json" not in parts:
        raise SampleError("bad_record", "there is no .json file beside its images")
    try:
        record = json.loads(parts["json"])
    except ValueError as error:  # UnicodeDecodeError is one too
        raise SampleError("bad_record", f"its .json file cannot be read ({error})") from error
    images = {name.split(".", 1)[0]: data for name, data in parts.items() if name != "json"}
    if sorted(images) != sorted(str(number) for number in range(len(parts) - 1)):
        names = ", ".join(sorted(parts))
        raise SampleError("bad_record", f"its images are not numbered 0, 1, ... without gaps (it has {names})")
    return record, [images[str(number)] for number in range(len(images))]
