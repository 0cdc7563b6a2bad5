# SPDX-License-Identifier: Apache-2.0
"""Checks that a torch_dist checkpoint's weights fit the model, before Megatron loads it."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training import print_rank_0
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_smar.checkpoint.fit import CheckpointMismatchError, checkpoint_to_load, resumes
from megatron_smar.checkpoint.metadata import DamagedError, check_objects, read_contents
from megatron_smar.checkpoint.torch_dist import CheckpointReader
from megatron_smar.routing.router import ModalityAwareRouter
from megatron_smar.routing.strategies import STRATEGIES

OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
STRATEGY = ".mlp.router.strategy."
BIAS_OF_A_LINEAR_LAYER = "disable-bias-linear"
# Pattern of a weight's name -> the flag that gives a model this weight; the first match counts.
FLAGS = (
    (r"^connector\.", "connector"),
    (r"^vision_model\.", "vision-model"),
    (r"modality_bias", "no-modality-router-bias"),
    (r"router\.strategy\.", "modality-routing"),
    (r"router\.expert_bias", "moe-router-enable-expert-bias"),
    (r"output_layer\.bias", "output-bias"),
    (r"(layer|layernorm|layer_norm|norm)[._]bias", "normalization"),
    (r"linear_qkv\.bias", f"add-qkv-bias, --{BIAS_OF_A_LINEAR_LAYER}"),
    (r"linear_\w+\.bias", BIAS_OF_A_LINEAR_LAYER),
    (r"(q|k)_(layer)?norm|(q|kv)_(up_proj\.layer_norm|layernorm)", "qk-layernorm"),
    (r"shared_experts\.gate", "moe-shared-expert-gate"),
    (r"shared_experts\.", "moe-shared-expert-intermediate-size"),
    (r"\.mlp\.(experts|router)", "num-experts, --moe-layer-freq"),
    (r"linear_(q|kv)_(down_|up_)?proj\.", "multi-latent-attention, --q-lora-rank"),
    (r"output_layer\.weight", "untie-embeddings-and-output-weights"),
    (r"position_embeddings", "position-embedding-type"),
    (r"\.mtp\.", "mtp-num-layers"),
    (r"shared_layernorm", "parallel-block"),
    (r"\.layers\.", "num-layers, --moe-layer-freq, --parallel-block"),
)


def check_weights(model: MegatronModule, args: Namespace) -> None:
    """Compares the weights of this rank's part of the model with those in the checkpoint, by name and shape.

    The result is shared with all ranks. With virtual pipeline stages, call this for each model chunk in order.

    Where the run does not resume (a new run, or evaluation), the checkpoint may lack the routing strategy's weights:
    they start as in a new model, and further gates as the gate that is loaded.

    Args:
        model: One pipeline stage, or one of its model chunks.
        args: The run's arguments.

    Raises:
        CheckpointMismatchError: On every rank, if any rank found a weight missing or of another shape, or an object
            damaged, or if the checkpoint has an extra weight that is neither training state, a zero bias nor allowed.
    """
    folder = checkpoint_to_load(args)
    if folder is None:
        return
    if not resumes(args, folder):
        _start_strategies(model, args, folder)
    weights = {part.key: part for _, part in _weights(model)}
    _collect(model.vp_stage, weights)
    found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(found, (_damage(folder), _first_mismatch(weights, folder)))
    place = f"--load {args.load or args.pretrained_checkpoint}"
    if damage := next(filter(None, (damage for damage, _ in found)), None):
        raise CheckpointMismatchError(f"{place} cannot be loaded: {damage}")
    problem = next(filter(None, (mismatch for _, mismatch in found)), None)
    if problem is None and model.vp_stage in (None, (args.virtual_pipeline_model_parallel_size or 1) - 1):
        problem = _first_unexpected(read_contents(folder), folder, set(args.allow_model_change))
    if problem:
        raise CheckpointMismatchError(
            f"{place} holds another model than the flags describe: {problem}; "
            "give the flags that the checkpoint was trained with, or --use-checkpoint-args."
        )


_NAMES: set[str] = set()  # names of this rank's weights, of all model chunks


def _collect(vp_stage: int | None, weights: dict[str, ShardedTensor]) -> None:
    if not vp_stage:
        _NAMES.clear()
    _NAMES.update(weights)


def _start_strategies(model: MegatronModule, args: Namespace, folder: Path) -> None:
    """Makes each router start its strategy's weights, and says so, where a new run's checkpoint does not have them.

    A checkpoint of another strategy, or of the pretrained model, lacks them.
    """
    stored = read_contents(folder).state_dict_metadata
    routers = {name: module for name, module in model.named_modules() if isinstance(module, ModalityAwareRouter)}
    for router in routers.values():
        router.start_without(())
    lacking = [name for name, part in _weights(model) if STRATEGY in name and part.key not in stored]
    for name, router in routers.items():
        prefix = f"{name}.strategy."
        router.start_without(each.removeprefix(prefix) for each in lacking if each.startswith(prefix))
    lacks = torch.tensor(bool(lacking), dtype=torch.int32, device="cuda")
    dist.all_reduce(lacks, op=dist.ReduceOp.MAX)  # the first rank's layers need not have experts
    if lacks and not model.vp_stage:
        print_rank_0(
            f"--load {args.load or args.pretrained_checkpoint} has no weights of --modality-routing "
            f"{args.modality_routing}: they start as in a new model, and further gates as the gate that is loaded."
        )


def _weights(model: MegatronModule) -> Iterator[tuple[str, ShardedTensor]]:
    """Yields the weights of this part of the model, by their names in the model; `key` is that in the checkpoint."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for name, part in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).items():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        for each in built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]:
            if isinstance(each, ShardedTensor):
                yield name, each


def _damage(folder: Path) -> str:
    """Describes the first damaged object among those that this rank checks; empty if there is none."""
    try:
        check_objects(folder, read_contents(folder), dist.get_rank(), dist.get_world_size())
    except DamagedError as error:
        return str(error)
    return ""


def _first_mismatch(weights: dict[str, ShardedTensor], folder: Path) -> str:
    """Describes this rank's first weight that the checkpoint lacks or has in another shape; empty if there is none."""
    contents = read_contents(folder)
    for key, tensor in weights.items():
        stored = contents.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            start = "; a resumed run cannot change it, --finetune starts a new run" if STRATEGY in key else ""
            return f"{key} is missing from the checkpoint ({_flag(key)}{start})"
        here, there = tuple(tensor.global_shape), tuple(stored.size)
        if here != there and not (tensor.allow_shape_mismatch and here[1:] == there[1:]):
            return f"{key} has shape {list(there)} in the checkpoint and {list(here)} in the model"
    return ""


def _first_unexpected(contents: Metadata, folder: Path, allowed: set[str]) -> str | None:
    """Describes the first weight of the checkpoint that no rank's part of the model has; None if there is none."""
    kinds = contents.state_dict_metadata.items()
    names = sorted(key for key, kind in kinds if isinstance(kind, TensorStorageMetadata) and not OPTIMIZER.match(key))
    has = torch.tensor([name in _NAMES for name in names], dtype=torch.int32, device="cuda")
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    unexpected = [name for name, present in zip(names, has.tolist(), strict=True) if not present]
    unexpected = [name for name in unexpected if not _is_training_state(name)]
    if unexpected and all("modality_bias" in name for name in unexpected) and not _any_bias(folder):
        return None  # the biases are zero, as an import writes them: nothing is lost
    unexpected = [name for name in unexpected if not allowed & set(_flag(name).removeprefix("--").split(", --"))]
    first = next(iter(unexpected), None)
    return f"it has {first}, for which this model has no place ({_flag(first)})" if first else None


def _is_training_state(key: str) -> bool:
    """Returns whether a checkpoint's tensor is state of a routing strategy that only training needs."""
    states = (name for strategy in STRATEGIES.values() for name in strategy.training_state)
    return STRATEGY in key and key.rpartition(".")[2] in states


def _any_bias(folder: Path) -> bool:
    """Returns whether any modality bias of a checkpoint is not zero."""
    reader = CheckpointReader(folder)
    sizes = {key: tuple(data.size) for key, data in reader.tensors.items() if key.endswith(".modality_bias.bias")}
    return any(
        reader.read(key, (0,) * len(size), size).any() for key, size in sizes.items() if not OPTIMIZER.match(key)
    )


def _flag(key: str) -> str:
    """Returns the flag that gives a model this weight."""
    return "--" + next((flag for pattern, flag in FLAGS if re.search(pattern, key)), "use-checkpoint-args")
