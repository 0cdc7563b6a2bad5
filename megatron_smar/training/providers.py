# SPDX-License-Identifier: Apache-2.0
"""The functions that Megatron's `pretrain()` calls: model, data, forward step."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from torch import Tensor

from megatron_smar.checkpoint.weights_fit import check_weights
from megatron_smar.config.build import get_run_config, transformer_config
from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.data.conversations import template_for
from megatron_smar.data.loader import EnergonIterator, build_train_loader, build_valid_loader
from megatron_smar.data.sample_log import RecordedSamples
from megatron_smar.data.tokens import TextEncoder
from megatron_smar.model.vlm import VisionLanguageModel
from megatron_smar.monitoring.throughput import ThroughputMeter
from megatron_smar.monitoring.tracker import watch_routing
from megatron_smar.runtime.signals import begin_training
from megatron_smar.training.batch import DataWait, prepare_batch, read_ahead
from megatron_smar.training.console import write_arguments
from megatron_smar.training.loss import lm_loss, weighted_lm_loss
from megatron_smar.training.resume import restore
from megatron_smar.training.summary import data_lines, place_lines, summary
from megatron_smar.training.throughput import throughput_meter
from megatron_smar.training.watch import watch_model, watch_samples, watch_steps

_CHUNKS: list[VisionLanguageModel] = []  # this rank's model chunks, in the order in which they were built
_METER: list[ThroughputMeter] = []  # of this run, while it trains

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
    args, run = get_args(), get_run_config()
    print_rank_0("building VisionLanguageModel ...")
    model = VisionLanguageModel(
        config or transformer_config(args),
        run.language,
        run.vision,
        run.connector,
        run.routing,
        freeze=run.freeze,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        balance_vision=run.balance_vision,
    )
    check_weights(model, args)
    watch_routing(model)
    watch_model(model)
    _CHUNKS.append(model)
    return model


def release_model() -> None:
    """Drops the references to the model's chunks: process groups, with their threads, live as long as those do."""
    _CHUNKS.clear()


def _show_summary(args: Namespace) -> None:
    """Prints the summary of the run on rank 0; every rank counts its parameters."""
    arguments = write_arguments(args) if dist.get_rank() == 0 else None
    lines = summary(_CHUNKS, args, data_lines(args), place_lines(args, arguments))
    print_rank_0("\n".join(lines))


def data_iterators_provider(
    num_samples: list[int], vp_stage: int | None = None
) -> tuple[Iterator[VisionLanguageBatch] | None, Iterator[VisionLanguageBatch] | None, None]:
    """Builds this rank's training and validation iterators (Megatron's `external` dataloaders).

    Args:
        num_samples: Number of training, validation and test samples that Megatron will request.
        vp_stage: Virtual pipeline stage; all stages read the same samples.
    """
    args = get_args()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = get_run_config().data
    assert config is not None
    place = (groups.dp.rank(), groups.dp.size())
    settings = {
        "decode_images": groups.pp.rank() == 0 and not vp_stage,  # only the first chunk has the vision encoder
        "announce_rejects": groups.tp.rank() == groups.cp.rank() == groups.pp.rank() == 0 and not vp_stage,
    }
    if not vp_stage:
        _show_summary(args)
        _METER[:] = [throughput_meter(args, get_run_config(), _placeholders(), groups)]
        watch_steps(args, [chunk.step for chunk in _CHUNKS])
    train: Iterator[VisionLanguageBatch] | None = None
    valid: Iterator[VisionLanguageBatch] | None = None
    if not args.skip_train:
        train = EnergonIterator(build_train_loader(config, get_tokenizer(), *place, **settings), config)
        opened.append(train)
        restore(train, *place)
        train = watch_samples(train, not vp_stage)
        if args.record_samples and settings["announce_rejects"]:
            train = RecordedSamples(train, args.record_samples, *place, args.iteration, lambda: args.curr_iteration + 1)
        weighting = get_run_config().loss_weighting
        train = read_ahead(train, groups.dp, args.calculate_per_token_loss, weighting)
    if num_samples[1] > 0:
        batches = args.eval_iters * args.eval_global_batch_size // (args.eval_micro_batch_size * place[1])
        config = dataclasses.replace(config, micro_batch_size=args.eval_micro_batch_size)
        loader = build_valid_loader(config, get_tokenizer(), *place, num_batches=batches, **settings)
        opened.append(EnergonIterator(loader, config, batches_per_pass=batches))
        valid = watch_samples(opened[-1], is_training=False)
    begin_training()
    return train, valid, None


opened: list[EnergonIterator] = []


def close_loaders() -> None:
    """Stops the data workers of this process."""
    while opened:
        opened.pop().close()


data_iterators_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank builds its own


def build_forward_step() -> ForwardStep:
    """Builds the forward step of the run."""
    # The data loaders would also report a missing token, but only after the model has been built.
    return make_forward_step(_placeholders(), get_run_config().tokens_per_tile)


def _placeholders() -> Sequence[int]:
    """Returns the token ids of the placeholders, one for each kind of images."""
    run, tokenizer = get_run_config(), get_tokenizer()
    encoder = TextEncoder(tokenizer, template_for(run.template, tokenizer).special_tokens, run.modalities)
    return encoder.image_tokens.placeholder_ids


def make_forward_step(placeholders: Sequence[int], tile_tokens: int) -> ForwardStep:
    """Makes the forward step that Megatron's schedules call for each micro-batch.

    Args:
        placeholders: Token ids of the placeholders, one for each kind of images, in the order of the modalities.
        tile_tokens: Vision tokens per tile.

    Returns:
        A function of the data iterator and the model, which returns this stage's output and the function that computes
        the loss from it.
    """
    data_wait, slowness = DataWait(), StragglerDetector()  # Megatron's, of --log-straggler, which measures on CUDA
    weighting = get_run_config().loss_weighting

    def forward_step(
        data_iterator: Iterator[VisionLanguageBatch], model: torch.nn.Module
    ) -> tuple[Tensor, LossFunction]:
        args, timers = get_args(), get_timers()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        timers("batch-generator", log_level=2).start()
        with_images = get_attr_wrapped_model(model, "pre_process")
        with slowness(bdata=True):
            read, waited = data_wait.next(data_iterator)
            batch = prepare_batch(read, placeholders, tile_tokens, with_images, groups, waited)
        if model.training:
            step = get_attr_wrapped_model(model, "step")
            step.iteration, step.tokens = args.curr_iteration, batch.step_tokens
            step.samples = max(step.samples, batch.samples)
            if _METER and not get_attr_wrapped_model(model, "vp_stage"):  # every chunk of a rank reads the same samples
                _METER[0].count(read)
        timers("batch-generator").stop()
        with slowness:
            output = model(**batch.model_inputs(), labels=batch.labels, loss_positions=batch.loss_positions)
        # In validation Megatron would print each share as a validation loss, with its perplexity.
        shares, check = batch.shares if model.training else {}, args.check_for_nan_in_loss_and_grad
        if model.training and weighting is not None:
            if batch.loss_weights is None or batch.step_weight is None:
                raise RuntimeError(
                    f"--loss-weighting {weighting} needs the sum of a step's weights before its first micro-batch: "
                    "wrap the iterator with megatron_smar.training.batch.read_ahead."
                )
            weights, ranks = batch.loss_weights, groups.dp_cp.size()
            return output, partial(weighted_lm_loss, weights, shares, check, step_weight=batch.step_weight, ranks=ranks)
        return output, partial(
            lm_loss,
            batch.loss_mask,
            shares,
            check,
            context_tokens=None if args.calculate_per_token_loss else batch.context_tokens,
            context_parallel_size=groups.cp.size(),
        )

    return forward_step
