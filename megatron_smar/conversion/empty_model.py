# SPDX-License-Identifier: Apache-2.0
"""Builds the trainer's model without weights, to list what its checkpoint must hold by name and shape."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.arguments import (
    add_megatron_arguments,
    parse_args,
    validate_args,
)
from transformers import PretrainedConfig

from megatron_smar.checkpoint.model_identity import describe_tower
from megatron_smar.config.build import language_config, modality_routing_config, transformer_config, vision_config
from megatron_smar.config.checks import check_shape
from megatron_smar.config.flags import add_arguments
from megatron_smar.conversion.architectures.common import Flags
from megatron_smar.model.vlm import VisionLanguageModel

# Megatron's parser requires these as well; they do not describe a model.
TRAINING = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-5 --tokenizer-type NullTokenizer".split()

# Flags of a model that may still differ from run to run.
CHOICES_OF_A_RUN = {
    "attention-dropout",
    "hidden-dropout",
    "max-position-embeddings",
    "moe-layer-freq",  # a number and a list can mean the same; a real difference shows in the weights' shapes
    "moe-router-load-balancing-type",
    "moe-token-dispatcher-type",
    "no-rope-fusion",
}


def as_argv(flags: Flags) -> list[str]:
    """Returns flags as command-line arguments; flags that are None or False are left out."""
    argv = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, (list, tuple)) else [] if value is True else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv


def parse(argv: Sequence[str], vocab_size: int) -> Namespace:
    """Returns the trainer's arguments for a model, parsed and validated by the trainer's own parser and checks.

    Args:
        argv: Flags that describe the model.
        vocab_size: Number of rows of the model's embedding, without padding: converted checkpoints are not padded.

    Raises:
        ValueError: The trainer would refuse the flags.
    """
    saved, sys.argv = sys.argv, [sys.argv[0], *TRAINING, *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints all arguments
            args = parse_args(add_arguments)
            args.seq_length = args.seq_length or args.max_position_embeddings
            args.vocab_size = vocab_size
            args.use_cpu_initialization = True  # otherwise Megatron's and Transformer Engine's layers ask for a GPU
            validate_args(args)
            check_shape(args)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"the trainer refuses the model's flags: {error}") from error
    finally:
        sys.argv = saved
    args.padded_vocab_size = args.true_vocab_size = vocab_size
    args.vision_tower = describe_tower(args)
    return args


def differing_flags(flags: Flags, expected: Namespace, saved: Any) -> list[str]:
    """Lists where a run's model differs from the one that flags describe, even if all weights have the same shapes.

    Args:
        flags: Flags that describe the model.
        expected: The trainer's arguments for these flags.
        saved: The run's arguments, from its checkpoint; arguments missing there pass.
    """
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    names = {option.removeprefix("--"): action.dest for action in parser._actions for option in action.option_strings}
    values = {
        name: (getattr(saved, names[name], getattr(expected, names[name])), getattr(expected, names[name]))
        for name in flags
        if name not in CHOICES_OF_A_RUN
    }
    return [f"--{name} was {was}, not {now}" for name, (was, now) in values.items() if was != now]


def build_empty(args: Namespace) -> VisionLanguageModel:
    """Builds the full model on one rank on the meta device: names and shapes, but no memory for weights."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = transformer_config(args)
    config.perform_initialization = False
    with torch.device("meta"):
        return VisionLanguageModel(
            config,
            language_config(args),
            dataclasses.replace(vision_config(args), has_weights=False),
            args.connector,
            modality_routing_config(args),
            freeze=frozenset(),
        )


def describe_model(
    config: PretrainedConfig, flags: Flags
) -> tuple[Namespace, dict[str, list[ShardedTensor]], list[ShardedObject]]:
    """Returns the trainer's arguments for a model, and the sharded tensors and objects that it would save.

    Args:
        config: The composite model's config.
        flags: Flags that describe the model.
    """
    with tempfile.TemporaryDirectory() as folder:  # the trainer reads the vision tower's shape from a folder
        config.save_pretrained(folder)
        args = parse([*as_argv(flags), "--vision-model", folder], config.text_config.vocab_size)
        return args, *sharded_parts(build_empty(args))


def sharded_parts(model: VisionLanguageModel) -> tuple[dict[str, list[ShardedTensor]], list[ShardedObject]]:
    """Returns what Megatron would save of the model: the parts of each weight by its name, and other objects."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tensors: dict[str, list[ShardedTensor]] = {}
    objects = []
    for name, part in model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}).items():
        built = part.build() if isinstance(part, ShardedTensorFactory) else part
        parts = list(built.values()) if isinstance(built, dict) else built if isinstance(built, list) else [built]
        for each in parts:
            if isinstance(each, ShardedTensor):
                tensors.setdefault(name, []).append(each)
            elif isinstance(each, ShardedObject):
                objects.append(each)
    return tensors, objects


def write_flags(path: Path, flags: Flags) -> None:
    """Writes flags to a file for use as $(cat FILE) on a command line, one flag with its values per line."""
    lines = [" ".join(as_argv({name: value})) for name, value in flags.items()]
    path.write_text("\n".join(line for line in lines if line) + "\n")
