# SPDX-License-Identifier: Apache-2.0
"""The summary of a run, printed before its first step: model, layout, data, strategy, schedule, memory, folders."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import nn

from megatron_smar.config.build import get_run_config
from megatron_smar.model.parts import LANGUAGE_PARTS, frozen_parts, part_of

GIB = 1024.0**3
_LOSSES = {
    "token": "the mean over all loss tokens of a step",
    "sample": "the mean over all samples of a step, each the mean over its loss tokens",
    "sqrt": "a weighted mean over all loss tokens of a step: 1 / sqrt(n), n the loss tokens of the sample",
}


@dataclass(frozen=True)
class Memory:
    """Memory on one rank in bytes, computed from its parameters.

    Attributes:
        weights: Bytes of the model's parameters, in their data type.
        gradients: Bytes of the buffers in which Megatron accumulates gradients.
        optimizer: Bytes of Adam's two moments and, for half-precision weights, of their float32 copies.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.weights + self.gradients + self.optimizer


def own_parameters(chunks: Iterable[nn.Module], groups: ProcessGroupCollection) -> dict[str, int]:
    """Counts parameters by part, each on one rank only, so that the sum over all ranks is the model's.

    Of the ranks with the same parameter, or the same shard of it, the first counts it. Embeddings that the last
    pipeline stage shares with the first are counted on the first.

    Args:
        chunks: The model chunks (pipeline stages) of this rank.
        groups: Megatron's process groups.

    Returns:
        Number of parameters by part.
    """
    counts: dict[str, int] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            name = name.removeprefix("module.")
            if _is_first_holder(parameter, groups) and not getattr(parameter, "shared", False):
                part = part_of(name)
                counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _is_first_holder(parameter: nn.Parameter, groups: ProcessGroupCollection) -> bool:
    is_expert = not getattr(parameter, "allreduce", True)
    replicas, tensor = (groups.expt_dp, groups.expt_tp) if is_expert else (groups.dp_cp, groups.tp)
    is_sharded = getattr(parameter, "tensor_model_parallel", False)
    return get_pg_rank(replicas) == 0 and (is_sharded or get_pg_rank(tensor) == 0)


def memory_of(chunks: Iterable[nn.Module], args: Namespace, groups: ProcessGroupCollection) -> Memory:
    """Computes the memory of this rank's weights, gradients and optimizer state.

    Activations, communication buffers and fragmentation are not included.

    Args:
        chunks: The model chunks (pipeline stages) of this rank.
        args: Megatron's arguments.
        groups: Megatron's process groups; the distributed optimizer shards its state over a parameter's replicas.
    """
    weights = gradients = optimizer = 0
    for chunk in chunks:
        for parameter in chunk.parameters():
            size = parameter.numel()
            weights += size * parameter.element_size()
            if not parameter.requires_grad or args.skip_train:
                continue
            in_float32 = args.accumulate_allreduce_grads_in_fp32
            gradients += size * (4 if in_float32 else parameter.element_size())
            replicas = groups.dp_cp if getattr(parameter, "allreduce", True) else groups.expt_dp
            shares = get_pg_size(replicas) if args.use_distributed_optimizer else 1
            copies = 4 if parameter.dtype != torch.float32 else 0
            moments = 8 if args.optimizer == "adam" else 4
            optimizer += size * (copies + moments) // shares
    return Memory(weights, gradients, optimizer)


def summary(chunks: Sequence[nn.Module], args: Namespace, sources: Sequence[str], places: Sequence[str]) -> list[str]:
    """Returns the lines of the summary; all ranks must call it, since they have different parts of the model.

    Args:
        chunks: The model chunks (pipeline stages) of this rank.
        args: The run's arguments.
        sources: The lines about the data.
        places: The lines about the folders that the run writes to.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (own_parameters(chunks, groups), memory_of(chunks, args, groups)))
    counts = {part: sum(own.get(part, 0) for own, _ in found) for part in ("vision", "connector", *LANGUAGE_PARTS)}
    largest = max((memory for _, memory in found), key=lambda memory: memory.total)
    lines = ["-" * 100, *_model_lines(counts, args), *_layout_lines(args)]
    lines += [f"  {'data' if not i else '':12}{line}" for i, line in enumerate(sources)]
    lines += [*_training_lines(args)]
    lines.append(
        f"  {'memory':12}{_size(largest.total)} on the fullest rank, computed: weights {_size(largest.weights)}, "
        f"gradients {_size(largest.gradients)}, optimizer {_size(largest.optimizer)}; activations not included"
    )
    lines += [f"  {'writes' if not i else '':12}{line}" for i, line in enumerate(places)]
    return [*lines, "-" * 100]


def _model_lines(counts: dict[str, int], args: Namespace) -> list[str]:
    experts = f", {args.num_experts} experts, top {args.moe_router_topk}" if args.num_experts else ", dense"
    kind = f"{args.num_layers} layers of {args.hidden_size}, {args.num_attention_heads} heads{experts}"
    lines = [f"  {'model':12}{kind}, {str(args.params_dtype).removeprefix('torch.')}"]
    frozen = frozen_parts(args.freeze)
    for part, count in counts.items():
        if count:
            lines.append(f"    {part:12}{count:>18,}  {'frozen' if part in frozen else 'learns'}")
    learning = sum(count for part, count in counts.items() if part not in frozen)
    return [*lines, f"    {'all':12}{sum(counts.values()):>18,}  of which {learning:,} learn"]


def _layout_lines(args: Namespace) -> list[str]:
    sizes = {
        "TP": args.tensor_model_parallel_size,
        "PP": args.pipeline_model_parallel_size,
        "CP": args.context_parallel_size,
        "EP": args.expert_model_parallel_size,
        "DP": args.data_parallel_size,
    }
    layout = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "DP")
    sequence = ", sequence parallelism" if args.sequence_parallel else ""
    optimizer = ", distributed optimizer" if args.use_distributed_optimizer else ""
    return [f"  {'layout':12}{args.world_size} ranks: {layout}{sequence}{optimizer}"]


def _training_lines(args: Namespace) -> list[str]:
    routing = get_run_config().routing
    strategy = routing.strategy.describe()
    if routing.strategy.name != "none":
        strategy += f", {routing.scope} statistics"
    batch = f"{args.global_batch_size} samples = {args.micro_batch_size} x {args.data_parallel_size} replicas"
    warmup = args.lr_warmup_iters or (f"{args.lr_warmup_fraction:g} of the decay" if args.lr_warmup_fraction else 0)
    return [
        f"  {'strategy':12}{strategy}",
        f"  {'schedule':12}steps {args.iteration + 1} to {args.train_iters}, {batch} x {get_num_microbatches()} "
        f"micro-batches, {args.seq_length} tokens at most",
        f"  {'':12}{args.optimizer}, learning rate {args.lr}, {args.lr_decay_style}, to {args.min_lr}, "
        f"warm-up {warmup}",
        f"  {'loss':12}{_loss(args)}",
    ]


def _loss(args: Namespace) -> str:
    weighting = get_run_config().loss_weighting
    if weighting is not None:
        return f"{_LOSSES[weighting]} (--loss-weighting {weighting})"
    if args.calculate_per_token_loss:
        return f"{_LOSSES['token']} (--calculate-per-token-loss)"
    return "the mean over each micro-batch's loss tokens, then over micro-batches and replicas"


def _size(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 1024**2:.2f} MiB"


def data_lines(args: Namespace) -> list[str]:
    """Returns the lines about the data: the folder, or each source of a blend with its share."""
    path = Path(args.data_path[0]) if args.data_path else None
    lines = [f"{path}, template {args.conversation_template}"] if path else ["none"]
    if args.text_only_ratio is not None:
        lines[0] += f", text-only share {args.text_only_ratio:g}"
    return [*lines, *(blend_shares(path) if path and path.suffix in (".yaml", ".yml") and path.is_file() else [])]


def blend_shares(path: Path, most: int = 8) -> list[str]:
    """Returns a line for each source of a blend file's training split, with its share, and the number beyond `most`."""
    import yaml

    train = (yaml.safe_load(path.read_text(encoding="utf-8")).get("splits") or {}).get("train") or {}
    sources = train.get("blend") or []
    total = sum(float(source.get("weight", 1)) for source in sources) or 1.0
    lines = [f"{100 * float(source.get('weight', 1)) / total:6.2f}%  {source.get('path')}" for source in sources]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def place_lines(args: Namespace, arguments: Path | None) -> list[str]:
    """Returns the lines about the folders that the run writes to."""
    every = f", every {args.save_interval} steps" if args.save_interval else ""
    return [
        f"checkpoints: {args.save}{every}" if args.save else "no checkpoints (--save)",
        f"TensorBoard: {args.tensorboard_dir}" if args.tensorboard_dir else "no TensorBoard (--tensorboard-dir)",
        f"arguments: {arguments}"
        if arguments
        else "no list of arguments (--save or --tensorboard-dir; --all-messages)",
    ]
