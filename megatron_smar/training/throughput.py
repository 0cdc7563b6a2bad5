# SPDX-License-Identifier: Apache-2.0
"""Sets up the measurement of a run's throughput."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_smar import runtime
from megatron_smar.config.build import RunConfig, transformer_config
from megatron_smar.config.shape import model_shape
from megatron_smar.monitoring.throughput import ThroughputConfig, ThroughputMeter
from megatron_smar.monitoring.tracker import measure_throughput
from megatron_smar.planning.devices import peak_tflops
from megatron_smar.planning.operations import Recomputation
from megatron_smar.runtime.throughput import HOOK


def throughput_config(args: Namespace, run: RunConfig, replicas: int) -> ThroughputConfig:
    """Builds the throughput config of a run.

    Args:
        args: The run's arguments.
        run: The run's configs.
        replicas: Number of data-parallel replicas.
    """
    on_gpu, known = runtime.device() == "cuda", args.peak_tflops
    shape = model_shape(run.vision, run.freeze, run.language.vocab_size, transformer_config(args))
    return ThroughputConfig(
        shape=replace(shape, decoder=replace(shape.decoder, skips_unused=run.language.layers.skips_unused)),
        recomputation=recomputation(args),
        capacity_limited=args.moe_expert_capacity_factor is not None,
        peak_tflops=known or (peak_tflops(torch.cuda.get_device_name()) if on_gpu else None),
        replicas=replicas,
    )


def recomputation(args: Namespace) -> Recomputation:
    """Returns what a run recomputes, from Megatron's flags."""
    layers = args.num_layers if args.recompute_method == "uniform" else args.recompute_num_layers or 0
    if args.recompute_method == "block":
        layers *= args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    return Recomputation(args.recompute_granularity, tuple(args.recompute_modules or ()), layers)


def throughput_meter(
    args: Namespace, run: RunConfig, placeholders: Sequence[int], groups: ProcessGroupCollection
) -> ThroughputMeter:
    """Makes the run report its throughput; returns the meter that counts its micro-batches.

    Args:
        args: The run's arguments.
        run: The run's configs.
        placeholders: Token ids of the placeholders of vision tokens.
        groups: Megatron's process groups.
    """
    counts = groups.tp.rank() == groups.cp.rank() == groups.pp.rank() == 0
    meter = ThroughputMeter(throughput_config(args, run, groups.dp.size()), placeholders, counts)
    HOOK.step_operations = meter.step_operations
    measure_throughput(meter)
    return meter
