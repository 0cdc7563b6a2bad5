# SPDX-License-Identifier: Apache-2.0
"""The energon task encoder: from the shards' raw samples to micro-batches."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    Sample,
    SavableDataset,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    stateless,
)
from megatron.energon.edataclass import edataclass
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import LimitDataset, RepeatDataset

from megatron_smar.data.batch import EncodedSample, Pack, TokenizedSample, VisionLanguageBatch, collate, padded_length
from megatron_smar.data.blend import (
    MixtureDataset,
    RatioDataset,
    blend_weight,
    check_ranks,
    check_sizes,
    split_by_image,
)
from megatron_smar.data.config import DataConfig
from megatron_smar.data.conversations import record_segments, template_for
from megatron_smar.data.fields import image_modalities
from megatron_smar.data.images import read_each, read_image
from megatron_smar.data.packing import pack
from megatron_smar.data.raw_sample import split_parts
from megatron_smar.data.rejects import DataError, RejectLog, SampleError
from megatron_smar.data.sample_encoder import SampleEncoder
from megatron_smar.data.tiling import ImageProcessor
from megatron_smar.data.tokens import TextEncoder


@edataclass
class RawSample(Sample):
    """A sample as stored in a shard.

    Attributes:
        parts: The sample's files: the file's name without the sample's key (`json`, `0.jpg`) -> the file's content.
    """

    parts: dict[str, bytes]


@stateless
def cook(sample: CrudeSample) -> RawSample:
    """Wraps one of energon's crude samples unchecked; errors are found and counted when the sample is encoded."""
    parts = {name: content for name, content in sample.items() if not name.startswith("__")}
    return RawSample(**basic_sample_keys(sample), parts=parts)


class ConversationTaskEncoder(TaskEncoder[RawSample, Any, VisionLanguageBatch, VisionLanguageBatch]):
    """Encodes conversations with images: tokenizes each sample first, and decodes its images only after packing.

    Args:
        config: Data configuration.
        encoder: Encodes text to token ids.
        rejects: Log of the rejected samples.
        decode_images: False on pipeline stages that need no pixels: `pixel_values` is then [0, 3, H, W], and everything
            else is the same.
    """

    cookers = (Cooker(cook),)
    decoder = None  # this class decodes the images, not energon, so that it can report what is wrong with an image

    def __init__(
        self, config: DataConfig, encoder: TextEncoder, rejects: RejectLog, *, decode_images: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.rejects = rejects
        self.decode_images = decode_images
        self._labels: dict[str, str] = {}
        self.template = template_for(config.template, encoder.tokenizer)
        self.images = ImageProcessor(config.image)
        self.samples = SampleEncoder(encoder, self.images, config.tokens_per_tile, config.seq_length)

    @stateless
    def preencode_sample(self, sample: RawSample) -> TokenizedSample:
        """Converts one sample to tokens; an unusable sample is logged and skipped.

        Raises:
            SkipSample: The sample cannot be used; energon then continues with the next sample.
            DataError: Too many samples cannot be used.
        """
        with self._recording(self.name(sample)):
            tokenized = self.tokenize_sample(sample)
        self.rejects.accept()
        return tokenized

    @stateless
    def postencode_sample(self, sample: TokenizedSample) -> EncodedSample:
        """Decodes one sample's images; an unusable sample is logged and skipped.

        Raises:
            SkipSample: The sample cannot be used; energon then continues with the next sample.
            DataError: Too many samples cannot be used, or other ranks could not detect this sample's damaged image.
        """
        with self._recording(sample.__key__, late=True):
            encoded = self.decode_sample(sample)
        self.rejects.accept(late=True)
        return encoded

    def encode(self, sample: RawSample) -> EncodedSample:
        """Encodes one sample completely.

        Raises:
            SampleError: The sample cannot be used.
            DataError: An image is damaged, and other ranks could not detect that.
        """
        return self.decode_sample(self.tokenize_sample(sample))

    def name(self, sample: RawSample) -> str:
        """Returns a sample's unique name: its key, prefixed with the source's name in a blend of sources."""
        sources = sample.__sources__
        label = self._labels.get(str(sources[0].dataset_path)) if sources else None
        return f"{label}/{sample.__key__}" if label else sample.__key__

    def tokenize_sample(self, sample: RawSample) -> TokenizedSample:
        """Converts a sample's record to tokens; the number of placeholders follows from the images' headers.

        Raises:
            SampleError: The sample cannot be used.
        """
        record, files = split_parts(sample.__key__, sample.parts)
        segments = record_segments(record, self.template, len(files))
        ids, targets = self.samples.tokenize(segments, files, image_modalities(record, len(files)))
        if not any(targets[1:]):
            raise SampleError("empty_conversation", "there is no token to learn")
        num_tiles = sum(map(ids.count, self.encoder.image_tokens.placeholder_ids)) // self.config.tokens_per_tile
        most = self.config.packing_max_tiles
        if most is not None and num_tiles > most:
            raise SampleError("too_many_tiles", f"{num_tiles} image tiles, but --packing-max-tiles is {most}")
        tokenized = TokenizedSample.derive_from(
            sample,
            **self.samples.inputs(ids, targets),
            num_tiles=num_tiles,
            files=files,
        )
        tokenized.__key__ = self.name(sample)
        return tokenized

    def decode_sample(self, sample: TokenizedSample) -> EncodedSample:
        """Decodes a sample's images.

        Raises:
            SampleError: The sample cannot be used.
            DataError: An image is damaged, and other ranks could not detect that.
        """
        return EncodedSample.derive_from(
            sample,
            input_ids=sample.input_ids,
            labels=sample.labels,
            loss_mask=sample.loss_mask,
            pixel_values=self._tiles(sample.files, sample.__key__),
            num_images=len(sample.files),
        )

    @contextlib.contextmanager
    def _recording(self, name: str, late: bool = False) -> Iterator[None]:
        try:
            yield
        except SampleError as error:
            self.rejects.add(name, error, late=late)
            raise SkipSample from error

    def _tiles(self, files: Sequence[bytes], key: str) -> torch.Tensor:
        try:
            if self.decode_images:
                return self.samples.tiles(files)
            if self.config.verify_images:
                read_each(files, read_image)
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
    def select_samples_to_pack(self, samples: list[TokenizedSample]) -> list[list[TokenizedSample]]:
        """Chooses which samples share a sequence of at most --seq-length tokens and --packing-max-tiles tiles."""
        multiple = self.config.packing_multiple_of
        packs = pack(
            [padded_length(len(sample.input_ids), multiple) for sample in samples],
            [sample.num_tiles for sample in samples],
            self.config.seq_length,
            self.config.packing_max_tiles,
        )
        return [[samples[index] for index in indices] for indices in packs]

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> Pack:
        """Combines the samples that share a sequence into a pack.

        Raises:
            SkipSample: None of the samples could be used.
        """
        if not samples:
            raise SkipSample
        return Pack.derive_from(samples[0], samples=samples)

    @stateless
    def batch(self, samples: list[Any]) -> VisionLanguageBatch:
        """Pads samples, or packs of samples, to a micro-batch, which always has `micro_batch_size` rows."""
        config = self.config
        packs = config.packing_buffer_size is not None
        rows = [sample.samples if packs else [sample] for sample in samples]
        multiple = config.packing_multiple_of if packs else 1
        longest = max(sum(padded_length(len(sample.input_ids), multiple) for sample in row) for row in rows)
        return collate(
            rows,
            num_rows=config.micro_batch_size,
            length=config.pad_to or padded_length(longest, config.pad_to_multiple_of),
            pad_id=self.encoder.pad_id,
            multiple=multiple if packs else None,
        )

    def build_train_datasets(
        self,
        *,
        datasets: list[LoadedDataset],
        worker_config: WorkerConfig,
        blend_mode: DatasetBlendMode = DatasetBlendMode.NONE,
        shuffle_buffer_size: int | None = None,
        **batching: Any,
    ) -> SavableDataset[VisionLanguageBatch]:
        """Builds energon's chain of datasets; with --text-only-ratio, that share of the samples is text-only.

        Text-only samples and samples with images are mixed after tokenization, so that samples that are rejected there
        do not change the ratio.
        """
        self._labels = _labels(datasets)
        place = f"--data-path {self.config.data_path}"
        build = functools.partial(
            super().build_train_datasets, worker_config=worker_config, shuffle_buffer_size=shuffle_buffer_size
        )
        if self.config.text_only_ratio is None:
            check_sizes(datasets, worker_config, place, "training samples")
            return build(datasets=datasets, blend_mode=blend_mode, **batching)
        kinds = split_by_image(datasets, blend_mode)
        for part, kind in zip(kinds, ("text-only training samples", "training samples with images"), strict=True):
            check_sizes(part, worker_config, place, kind)
        text, image = (
            build(datasets=part, blend_mode=DatasetBlendMode.DATASET_WEIGHT, batch_size=None) for part in kinds
        )
        ratio = self.config.text_only_ratio
        mixed: RatioDataset[TokenizedSample] = RatioDataset(text, image, ratio, worker_config=worker_config)
        batching = {name: value for name, value in batching.items() if name not in ("virtual_epoch_length", "repeat")}
        return self.build_batch(mixed, worker_config=worker_config, **batching)

    def build_val_datasets(
        self, *, datasets: list[LoadedDataset], worker_config: WorkerConfig, limit: int | None = None, **batching: Any
    ) -> SavableDataset[VisionLanguageBatch]:
        """Builds energon's chain of datasets for validation, in which the sources of a blend keep their weights.

        By itself, energon would read one source after the other, so that a short evaluation would read only the first.
        """
        self._labels = _labels(datasets)
        place = f"{'--valid-data-path' if self.config.valid_data_path else '--data-path'} {self.rejects.source}"
        if len(datasets) == 1:
            check_ranks(datasets[0], worker_config, place, "validation samples")
            return super().build_val_datasets(datasets=datasets, worker_config=worker_config, limit=limit, **batching)
        check_sizes(datasets, worker_config, place, "validation samples")
        mixed: SavableDataset[Any] = MixtureDataset(
            [
                RepeatDataset(self._load_dataset(source, 0, worker_config), worker_config=worker_config)
                for source in datasets
            ],
            [blend_weight(source) for source in datasets],
            worker_config=worker_config,
        )
        encoded = self.build_encode_sample(mixed, worker_config=worker_config)
        batches = self.build_batch(encoded, worker_config=worker_config, **batching)
        if limit is None:
            return batches
        return LimitDataset(batches, length=limit, worker_config=worker_config, reset_after_epoch=True)

    def build_batch(self, dataset: SavableDataset[Any], *, batch_size: int | None, **settings: Any) -> Any:
        """Batches a dataset; without a batch size (a dataset that is still to be mixed), returns it undecoded."""
        return dataset if batch_size is None else super().build_batch(dataset, batch_size=batch_size, **settings)


def _labels(datasets: Sequence[LoadedDataset]) -> dict[str, str]:
    """Returns a name for each source of a blend, by path; {} for a single source.

    The name is that of the source's folder if no other source has it, else the path. A sample's key alone does not
    identify it, because all prepared folders number their samples in the same way.
    """
    paths = sorted({str(path) for dataset in datasets for path in dataset.dataset.paths})
    folders = Counter(PurePosixPath(path).name for path in paths)
    labels = {path: PurePosixPath(path).name for path in paths}
    return {path: label if folders[label] == 1 else path for path, label in labels.items() if len(paths) > 1}
