# SPDX-License-Identifier: Apache-2.0
"""The functions that Megatron's `pretrain()` calls: model, data, forward step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.vocab_utils import calculate_padded_vocab_size
from torch import Tensor

from megatron_smar.arguments import data_config, language_config, modality_routing_config, vision_config
from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.loader import EnergonIterator, build_train_iterator, build_valid_iterator
from megatron_smar.data.tokens import ImageTokens
from megatron_smar.model.vision import load_vision_config, tokens_per_tile
from megatron_smar.model.vlm import VisionLanguageModel
from megatron_smar.training.batch import next_batch
from megatron_smar.training.loss import lm_loss

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
ForwardStep = Callable[[Iterator[VisionLanguageBatch], torch.nn.Module], tuple[Tensor, LossFunction]]


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> VisionLanguageModel:
    """Builds one pipeline stage of the model from the parsed arguments."""
    args = get_args()
    if args.padded_vocab_size is None:
        args.padded_vocab_size = calculate_padded_vocab_size(
            get_tokenizer().vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
        )
    print_rank_0("building VisionLanguageModel ...")
    return VisionLanguageModel(
        config or core_transformer_config_from_args(args),
        language_config(args),
        vision_config(args),
        args.connector,
        modality_routing_config(args),
        freeze=frozenset(args.freeze),
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def data_iterators_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[EnergonIterator | None, EnergonIterator | None, None]:
    """Builds this rank's training and validation iterators (Megatron's `external` dataloaders).

    Args:
        num_samples: Samples of training, validation and test that Megatron will ask for.
        vp_stage: Virtual pipeline stage; each reads the same samples.
    """
    args = get_args()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = data_config(args, tokens_per_tile=_tokens_per_tile(), decode_images=_decodes_images(groups, vp_stage))
    place = (groups.dp.rank(), groups.dp.size())
    train = None if args.skip_train else build_train_iterator(config, get_tokenizer(), *place)
    if train is not None and args.load and args.iteration > 0:
        train.restore(args.dataloader_save or args.load, args.iteration)
    valid = build_valid_iterator(config, get_tokenizer(), *place) if num_samples[1] > 0 else None
    return train, valid, None


data_iterators_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def _decodes_images(groups: ProcessGroupCollection, vp_stage: int | None) -> bool:
    """Only the first stage has the vision encoder."""
    return groups.pp.rank() == 0 and not vp_stage


def build_forward_step() -> ForwardStep:
    """The forward step for the parsed arguments."""
    return make_forward_step(ImageTokens.from_tokenizer(get_tokenizer()).context_id, _tokens_per_tile())


def _tokens_per_tile() -> int:
    vision = vision_config(get_args())
    return tokens_per_tile(vision, load_vision_config(vision))


def make_forward_step(image_token_id: int, tile_tokens: int) -> ForwardStep:
    """The forward step that Megatron's schedules call for each micro-batch.

    Args:
        image_token_id: The placeholder of one vision token.
        tile_tokens: Vision tokens per tile.

    Returns:
        A function of the data iterator and the model, which gives this stage's output and the function that makes the
        loss of it.
    """

    def forward_step(
        data_iterator: Iterator[VisionLanguageBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        args, timers = get_args(), get_timers()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        timers("batch-generator", log_level=2).start()
        with_images = _decodes_images(groups, getattr(model, "vp_stage", None))
        batch = next_batch(data_iterator, image_token_id, tile_tokens, with_images, groups)
        timers("batch-generator").stop()
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            modality_ids=batch.modality_ids,
            pixel_values=batch.pixel_values,
            vision_index=batch.vision_index,
            labels=batch.labels,
        )
        return output, partial(lm_loss, batch.loss_mask, args.check_for_nan_in_loss_and_grad)

    return forward_step
