# SPDX-License-Identifier: Apache-2.0
"""Checks that a checkpoint computes what a Hugging Face model computes: the same logits, the same greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.cbook import get_sample_data
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.tiling import ImageConfig, ImageProcessor
from megatron_smar.model.vision import VisionConfig, side_in_pixels, tokens_per_tile
from megatron_smar.training.batch import prepare_batch

TEXT = (
    "The quick brown fox jumps over the lazy dog while the engineers measure, once more, whether two programs that "
    "should compute the same numbers do so."
)
PICTURE = "grace_hopper.jpg"  # from matplotlib's sample data


@dataclass(frozen=True)
class Agreement:
    """How closely two models agree.

    Attributes:
        difference: Largest absolute difference between the two models' logits.
        largest: Largest absolute logit of the reference.
        agreeing: Number of positions at which both have the same most likely token.
        positions: Number of positions compared.
    """

    difference: float
    largest: float
    agreeing: int
    positions: int

    def within(self, tolerance: float) -> bool:
        """Returns whether the logits differ by at most `tolerance`, and all greedy tokens are the same."""
        return self.difference <= tolerance and self.agreeing == self.positions

    def table(self, tolerance: float) -> str:
        """Returns the comparison as text for a terminal."""
        return (
            f"largest absolute logit difference  {self.difference:.3e}   (tolerance {tolerance:.1e})\n"
            f"largest absolute logit             {self.largest:.3e}\n"
            f"greedy tokens that agree           {self.agreeing} of {self.positions}"
        )


def build_inputs(
    hf: Path, config: PretrainedConfig, texts: Sequence[str], pictures: Sequence[Path], multiple_of: int
) -> tuple[Tensor, Tensor]:
    """Returns token ids and tiles to compare models on.

    Each text gives one row without an image, and one row for each image.

    Args:
        hf: The model's folder; without a tokenizer there, the ids are sampled at random with a fixed seed.
        config: The composite model's config.
        texts: Texts; empty for a built-in sentence.
        pictures: Image files; empty for a photograph that comes with matplotlib.
        multiple_of: The rows' length is rounded down to a multiple of this.

    Returns:
        Ids [b, s], and the tiles of all rows, [n, 3, size, size] uint8.
    """
    vision = VisionConfig(str(hf), side_in_pixels(config.vision_config.image_size), config.downsample_ratio)
    processor = ImageProcessor(ImageConfig(image_size=vision.image_size))
    files = list(pictures) or [Path(get_sample_data(PICTURE, asfileobj=False))]
    tiles = torch.cat([processor(file.read_bytes()) for file in files])
    placeholders = torch.full((tokens_per_tile(vision),), config.image_token_id)
    rows = []
    for ids in _text_ids(hf, config, list(texts) or [TEXT]):
        rows += [ids, *(torch.cat([ids[:4], placeholders, ids[4:]]) for _ in files)]
    length = max(len(row) for row in rows) // multiple_of * multiple_of
    # Rows are filled by repeating their text: a model without a tokenizer has no padding token.
    filled = [torch.cat([row, *[_without(row, config.image_token_id)] * length])[:length] for row in rows]
    return torch.stack(filled), tiles.repeat(len(texts) or 1, 1, 1, 1)


def _text_ids(hf: Path, config: PretrainedConfig, texts: Sequence[str]) -> list[Tensor]:
    if (hf / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=False)
        return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    generator = torch.Generator().manual_seed(0)
    sampled = torch.randint(0, config.text_config.vocab_size, (len(texts), 48), generator=generator)
    return [_without(row, config.image_token_id) for row in sampled]


def _without(ids: Tensor, token: int) -> Tensor:
    return ids[ids != token]


@torch.no_grad()
def checkpoint_logits(model: list[Any], ids: Tensor, tiles: Tensor, image_token_id: int, tile_tokens: int) -> Tensor:
    """Returns the trainer's logits [b, s, padded vocabulary] in float32 on every rank; needs context parallelism 1.

    Args:
        model: This rank's model chunks, as `training.setup.start` returns them.
        ids: Token ids [b, s].
        tiles: Tiles of all rows, [n, 3, size, size] uint8.
        image_token_id: Id of the placeholder for one vision token.
        tile_tokens: Number of vision tokens per tile.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    batch = VisionLanguageBatch(
        __key__=[str(row) for row in range(len(ids))],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=torch.ones(ids.shape),
        padding_mask=torch.zeros(ids.shape, dtype=torch.bool),
        pixel_values=tiles,
    )
    for chunk in model:
        chunk.eval()
    steps = [iter([batch]) for _ in model]
    outputs = get_forward_backward_func()(
        forward_step_func=partial(_forward, image_token_id, tile_tokens),
        data_iterator=steps if len(model) > 1 else steps[0],
        model=model,
        num_microbatches=1,
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    found: list[Tensor | None] = [outputs[0] if outputs else None]
    last = dist.get_process_group_ranks(groups.pp)[-1]
    dist.broadcast_object_list(found, src=last, group=groups.pp)
    assert found[0] is not None
    return found[0]


def _forward(
    image_token_id: int, tile_tokens: int, data: Iterator[VisionLanguageBatch], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with_images = get_attr_wrapped_model(model, "pre_process")
    batch = prepare_batch(next(data), [image_token_id], tile_tokens, with_images, groups)
    output = model(**batch.model_inputs())

    def gather(logits: Tensor, non_loss_data: bool) -> Tensor:
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=groups.tp).float().cpu()

    return output, gather


def compare(reference: Tensor, trained: Tensor) -> Agreement:
    """Compares logits [b, s, vocabulary]; those of the trainer may have padding after the vocabulary."""
    trained = trained[..., : reference.shape[-1]]
    return Agreement(
        difference=float((reference - trained).abs().max()),
        largest=float(reference.abs().max()),
        agreeing=int((reference.argmax(-1) == trained.argmax(-1)).sum()),
        positions=reference[..., 0].numel(),
    )
