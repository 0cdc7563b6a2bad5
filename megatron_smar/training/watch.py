# SPDX-License-Identifier: Apache-2.0
"""Watches a training run: hangs, slow ranks, steps that are not finite, loss spikes; docs/reliability.md."""

from __future__ import annotations

import atexit
import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

from megatron_smar import runtime
from megatron_smar.checkpoint.metadata import saved_arguments
from megatron_smar.config.build import get_run_config
from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.reliability.hangs import HangWatch
from megatron_smar.reliability.loss_spikes import LossSpikes
from megatron_smar.reliability.step_samples import WatchedSamples, describe
from megatron_smar.reliability.stragglers import Stragglers
from megatron_smar.routing.step import TrainingStep
from megatron_smar.runtime.progress import PROGRESS, comparable_sections
from megatron_smar.runtime.skipped_steps import SKIPS
from megatron_smar.training.loss import LM_LOSS

MEGATRONS_TIMEOUT = 10  # minutes, the default of --distributed-timeout-minutes

_SAMPLES: list[WatchedSamples] = []  # of the first model chunk; the others read the same samples


def _outlast_hangs(args: Namespace) -> None:
    """Makes collectives wait longer than --hang-seconds, unless --distributed-timeout-minutes is given.

    Otherwise a rank that waits would end with Gloo's or NCCL's message before the watch has named the rank it waits
    for, and within Megatron's 10 minutes also in a first step, for which --hang-seconds-first-step allows more.
    """
    limit = max(args.hang_seconds, args.hang_seconds_first_step)
    if args.distributed_timeout_minutes == MEGATRONS_TIMEOUT and limit:
        args.distributed_timeout_minutes = max(MEGATRONS_TIMEOUT, math.ceil(limit / 60) + 5)


def count_skipped_steps(args: Namespace, state: dict[str, Any] | None) -> None:
    """Takes over the steps that the resumed run has skipped; they are saved with the arguments in each checkpoint.

    Args:
        args: The run's arguments.
        state: The result of `checkpoint.fit.resumed_state`.
    """
    args.skipped_steps = list(getattr(saved_arguments(state), "skipped_steps", [])) if state is not None else []
    SKIPS.allowed, SKIPS.done = args.max_skipped_steps, args.skipped_steps


def watch_for_hangs(args: Namespace) -> None:
    """Starts the watch, before the ranks connect: the start can hang too."""
    _outlast_hangs(args)
    watch = HangWatch(
        args.hang_seconds,
        args.hang_seconds_first_step,
        args.rank,
        args.world_size,
        store=lambda: _get_default_store() if dist.is_initialized() else None,
    )
    watch.start()
    atexit.register(watch.stop)


def watch_model(model: nn.Module) -> None:
    """Counts each pass of the model as progress, also in evaluation and generation."""
    model.register_forward_pre_hook(lambda *_: PROGRESS.beat())


def watch_samples(
    iterator: Iterator[VisionLanguageBatch], is_first_chunk: bool = True, is_training: bool = True
) -> WatchedSamples:
    """Returns the iterator, watched while it reads.

    Args:
        iterator: The loader's iterator.
        is_first_chunk: Whether it is read for the first model chunk of this rank.
        is_training: Whether steps are trained on it.
    """
    if not (is_first_chunk and is_training):
        return WatchedSamples(iterator)
    _SAMPLES[:] = [WatchedSamples(iterator, lambda: int(get_args().curr_iteration) + 1)]
    return _SAMPLES[0]


def keys_of(step: int) -> list[str]:
    """Returns the keys of the samples that this rank has read for a step."""
    return _SAMPLES[0].keys_of(step) if _SAMPLES else []


def watch_steps(args: Namespace, steps: list[TrainingStep]) -> None:
    """Watches the steps of a run.

    Args:
        args: The run's arguments.
        steps: The current step of each model chunk, whose routers accumulate statistics.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = get_run_config().reliability
    _skip_whole_steps(args, steps)
    if config.loss_spike_sigma:
        is_first = groups.dp.rank() == groups.tp.rank() == groups.cp.rank() == 0
        folder, last = _folder(args, "spikes"), args.train_iters
        spikes = LossSpikes(config.loss_spike_sigma, LM_LOSS, keys_of, groups.dp, is_first, folder, last)
        PROGRESS.after_step.append(spikes)
    if args.world_size > 1:
        sections = comparable_sections(runtime.device())
        PROGRESS.after_step.append(Stragglers(args.log_interval, sections, groups.pp.rank()))


def _skip_whole_steps(args: Namespace, steps: list[TrainingStep]) -> None:
    folder = _folder(args, "skipped_steps")

    def settle() -> None:
        for step in steps:
            step.settle()

    def discard() -> None:
        for step in steps:
            step.discard()

    SKIPS.settle, SKIPS.discard, SKIPS.keys_of = settle, discard, keys_of
    SKIPS.describe = lambda step, keys: describe(keys, folder and folder / f"step_{step:08d}.jsonl")


def _folder(args: Namespace, name: str) -> Path | None:
    return Path(args.save) / name if args.save else None
