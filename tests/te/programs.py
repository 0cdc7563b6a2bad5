# SPDX-License-Identifier: Apache-2.0
"""Runs the setup of training in this process, as on CUDA, and makes the converter's inputs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.launch import run

CONVERT = "tools/checkpoint/convert.py"
SETTINGS = """
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-2 --lr-decay-style constant --eval-iters 0
    --seq-length 128 --make-vocab-size-divisible-by 1 --bf16 --use-distributed-optimizer --save-interval 2
""".split()


def make_mixtral(folder: Path, vocab_size: int) -> Path:
    """Saves a random language model and returns its folder."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.architectures import CASES, SHAPE

    torch.manual_seed(0)
    config = MixtralConfig(**(SHAPE | CASES["mixtral"][1] | {"vocab_size": vocab_size, "max_position_embeddings": 128}))
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(float(parameter.dim() == 1), 0.2)
    model.save_pretrained(folder)
    return folder


def flags_of_checkpoint(folder: Path) -> list[str]:
    """Returns the flags that an import wrote next to its checkpoint, with the tower and the tokenizer."""
    hf = folder / "hf"
    place = [
        "--vision-model",
        hf,
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        hf / "tokenizer.model",
    ]
    return [*(folder / "flags.txt").read_text().split(), *map(str, place)]


@contextmanager
def trainer(*flags: object) -> Iterator[tuple[list[Any], Any, Any]]:
    """Yields model chunks, optimizer and scheduler as `pretrain()` builds them on one rank with CUDA."""
    import torch.distributed as dist
    from megatron.training.training import destroy_global_state

    from megatron_smar.training.setup import start

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield start([*map(str, flags), *SETTINGS])
    finally:
        destroy_global_state()
        dist.destroy_process_group()


def convert(world: Any, folder: Path) -> Path:
    """Converts a random Mixtral and the world's vision tower with convert.py; returns the checkpoint's folder."""
    mixtral = make_mixtral(folder / "mixtral", 397)  # without rows for the image tokens
    command = [CONVERT, "import", "--language", mixtral, "--vision", world.root / "vision"]
    run(*command, "--tokenizer-model", world.root / "tokenizer.model", "--output", folder / "checkpoint")
    return folder / "checkpoint"


def read_hf(folder: Path) -> dict[str, Any]:
    """Returns the weights of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def shapes_in(checkpoint: Path) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Returns dtype and shape of every tensor in a checkpoint, including the optimizer's, by its key."""
    from megatron.core.dist_checkpointing import load_tensors_metadata

    return {key: (part.dtype, part.global_shape) for key, part in load_tensors_metadata(str(checkpoint)).items()}
