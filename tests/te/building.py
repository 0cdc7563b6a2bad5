# SPDX-License-Identifier: Apache-2.0
"""Builds the model of each convertible architecture on one rank of a parallel layout, and lists what it would save."""

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.architectures import CASES, build_config

VOCABULARY = 132  # two tensor-parallel ranks divide it
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel --global-batch-size 2".split()
EXPERT = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1".split()
PIPELINE = "--pipeline-model-parallel-size 2".split()
# Experts for a dense model, as in MoE-LLaVA: in every second layer, with biases and a GELU approximated by tanh.
UPCYCLED = "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-layer-freq [0,1]".split()
UPCYCLED += (
    "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --no-bias-dropout-fusion".split()
)
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
MODELS = {name: (name, []) for name in CASES} | {"phi, upcycled": ("phi", UPCYCLED)}


@dataclass(frozen=True)
class Layout:
    """A parallel layout: its flags without `--transformer-impl`, Megatron's parallel sizes, and one of its ranks."""

    flags: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    world: int = 1
    rank: int = 0
    first: bool = True
    last: bool = True


def layouts_of(name: str) -> Iterator[Layout]:
    """Yields a layout of one rank, and all ranks of two layouts of four: tensor and expert, tensor and pipeline."""
    yield Layout()
    kind, upcycled = MODELS[name]
    settings = CASES[kind][1]
    experts = 4 if upcycled else next((settings[key] for key in EXPERT_COUNTS if key in settings), 0)
    # Three experts cannot be divided by two, and experts with biases do not support expert tensor parallelism.
    flags, sizes = [*TENSOR], {"tensor_model_parallel_size": 2}
    if experts and experts % 2 == 0:
        flags, sizes = [*TENSOR, *EXPERT], sizes | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    for rank in range(4):
        yield Layout(tuple(flags), tuple(sizes.items()), 4, rank)
    flags, sizes = [*TENSOR, *PIPELINE], {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    if upcycled:
        flags, sizes = [*flags, "--expert-tensor-parallel-size", "1"], sizes | {"expert_tensor_parallel_size": 1}
    for rank in range(4):
        yield Layout(tuple(flags), tuple(sizes.items()), 4, rank, first=rank < 2, last=rank >= 2)


@contextmanager
def rank_of(layout: Layout) -> Iterator[None]:
    """Makes this process one rank of a layout whose other ranks do not exist: collectives return immediately."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK=str(layout.rank), WORLD_SIZE=str(layout.world), LOCAL_RANK=str(layout.rank))
    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=layout.world)
    try:
        parallel_state.initialize_model_parallel(**dict(layout.sizes), create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def parse(name: str, tower: str, *more: str) -> Namespace:
    """Returns the training arguments of one of `MODELS`, with the defaults of the training's parser on CUDA."""
    from megatron_smar.conversion import empty_model
    from megatron_smar.conversion.architectures import language_of

    kind, upcycled = MODELS[name]
    config = build_config(kind)
    flags = empty_model.as_argv(language_of(config).flags(config))
    args = empty_model.parse([*flags, *upcycled, "--vision-model", tower, "--image-size", "32", *more], VOCABULARY)
    args.use_cpu_initialization = False  # the conversion's parser sets it
    return args


def build(args: Namespace, layout: Layout | None = None) -> Any:
    """Builds the model for these arguments, on this rank, as in training."""
    from megatron_smar.config.build import language_config, modality_routing_config, transformer_config, vision_config
    from megatron_smar.model.vlm import VisionLanguageModel

    place = layout or Layout()
    return VisionLanguageModel(
        transformer_config(args),
        language_config(args),
        vision_config(args),
        args.connector,
        modality_routing_config(args),
        freeze=frozenset(),
        pre_process=place.first,
        post_process=place.last,
    )


@dataclass(frozen=True)
class Part:
    """A shard of a weight, as described by `ShardedTensor`; the rank whose replica id is all zeros writes it."""

    dtype: str
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    fragments: tuple[int, ...]
    prepended: int
    replica: tuple[int, ...]


def tensors_of(model: Any) -> dict[tuple[str, tuple[int, ...]], Part]:
    """Returns every shard of a weight that this rank would save, by its key and its global offset."""
    from megatron_smar.conversion.empty_model import sharded_parts

    parts = [part for held in sharded_parts(model)[0].values() for part in held]
    found = {
        (part.key, part.global_offset): Part(
            str(part.dtype),
            part.local_shape,
            part.global_shape,
            part.axis_fragmentations,
            part.prepend_axis_num,
            part.replica_id if isinstance(part.replica_id, tuple) else (part.replica_id,),
        )
        for part in parts
    }
    assert len(found) == len(parts), "two shards have the same key and offset"
    return found


def objects_of(model: Any) -> set[str]:
    """Returns the keys of the objects other than tensors that this rank would save."""
    from megatron_smar.conversion.empty_model import sharded_parts

    return {part.key for part in sharded_parts(model)[1]}


def unnumbered(key: str) -> str:
    """Returns a key without the number of its layer; keys have one if layers differ."""
    return re.sub(r"\.\d+\.", ".", key)
