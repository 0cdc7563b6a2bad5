# SPDX-License-Identifier: Apache-2.0
"""Whether a torch_dist checkpoint holds the weights of the model that is to load it, all of them and no others."""

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
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_smar.checkpoint.fit import CheckpointMismatchError, checkpoint_to_load
from megatron_smar.checkpoint.metadata import DamagedError, check_objects, read_contents
from megatron_smar.checkpoint.torch_dist import CheckpointReader

OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
BIAS_OF_A_LINEAR_LAYER = "disable-bias-linear"
# Which flag gives a model a weight, by the weight's name; the first that matches.
FLAGS = (
    (r"^connector\.", "connector"),
    (r"^vision_model\.", "vision-model"),
    (r"modality_bias", "no-modality-router-bias"),
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

    Every rank learns the outcome. With virtual pipeline stages it is called for each chunk, in their order.

    Args:
        model: One pipeline stage, or one of its chunks.
        args: The run's.

    Raises:
        CheckpointMismatchError: On every rank, if any rank found a weight missing or of another shape, or the
            checkpoint has one that no rank has.
    """
    folder = checkpoint_to_load(args)
    if folder is None:
        return
    ours = dict(_weights(model))
    _collect(model.vp_stage, ours)
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, _first_mismatch(ours, folder))
    problem = next(filter(None, found), None)
    if problem is None and model.vp_stage in (None, (args.virtual_pipeline_model_parallel_size or 1) - 1):
        problem = _first_spare(read_contents(folder), folder, set(args.allow_model_change))
    if problem:
        raise CheckpointMismatchError(
            f"--load {args.load or args.pretrained_checkpoint} holds another model than the flags describe: {problem}; "
            "give the flags that the checkpoint was trained with, or --use-checkpoint-args."
        )


_NAMES: set[str] = set()  # of this rank's weights, all chunks together


def _collect(vp_stage: int | None, weights: dict[str, ShardedTensor]) -> None:
    if not vp_stage:
        _NAMES.clear()
    _NAMES.update(weights)


def _weights(model: MegatronModule) -> Iterator[tuple[str, ShardedTensor]]:
    """What the checkpoint must hold of this part of the model, by its names there."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for part in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).values():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        for each in built.values() if isinstance(built, dict) else built if isinstance(built, list) else [built]:
            if isinstance(each, ShardedTensor):
                yield each.key, each


def _first_mismatch(ours: dict[str, ShardedTensor], folder: Path) -> str:
    """The first weight of this rank that the checkpoint has not, or in another shape; or a damaged object in it."""
    contents = read_contents(folder)
    try:
        check_objects(folder, contents, dist.get_rank(), dist.get_world_size())
    except DamagedError as error:
        return str(error)
    for key, tensor in ours.items():
        stored = contents.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            return f"{key} is not in it ({_flag(key)})"
        here, there = tuple(tensor.global_shape), tuple(stored.size)
        if here != there and not (tensor.allow_shape_mismatch and here[1:] == there[1:]):
            return f"{key} is {list(there)} there and {list(here)} here"
    return ""


def _first_spare(contents: Metadata, folder: Path, allowed: set[str]) -> str | None:
    """The first weight of the checkpoint that no rank's part of the model has a place for."""
    kinds = contents.state_dict_metadata.items()
    names = sorted(key for key, kind in kinds if isinstance(kind, TensorStorageMetadata) and not OPTIMIZER.match(key))
    has = torch.tensor([name in _NAMES for name in names], dtype=torch.int32, device="cuda")
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    spare = [name for name, present in zip(names, has.tolist(), strict=True) if not present]
    if spare and all("modality_bias" in name for name in spare) and not _any_bias(folder):
        return None  # they are zero, as an import has them, and nothing is lost
    spare = [name for name in spare if not allowed & set(_flag(name).removeprefix("--").split(", --"))]
    return f"it has {spare[0]}, for which this model has no place ({_flag(spare[0])})" if spare else None


def _any_bias(folder: Path) -> bool:
    """Whether any modality bias of a checkpoint is other than zero."""
    reader = CheckpointReader(folder)
    sizes = {key: tuple(data.size) for key, data in reader.tensors.items() if key.endswith(".modality_bias.bias")}
    return any(
        reader.read(key, (0,) * len(size), size).any() for key, size in sizes.items() if not OPTIMIZER.match(key)
    )


def _flag(key: str) -> str:
    """The flag that gives a model this weight."""
    return "--" + next((flag for pattern, flag in FLAGS if re.search(pattern, key)), "use-checkpoint-args")
