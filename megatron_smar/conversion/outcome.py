# SPDX-License-Identifier: Apache-2.0
"""The closing line of a conversion: what was written, and the commands to use next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_smar.checkpoint.describe import decimal_bytes


@dataclass(frozen=True)
class Written:
    """The weights that a conversion wrote.

    Attributes:
        number: Number of weights.
        sizes: Bytes written per data type.
    """

    number: int
    sizes: Counter[torch.dtype]

    @classmethod
    def of(cls, number: int, tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> Written:
        """Sums up tensors, given the number of weights and each tensor's shape and data type."""
        sizes: Counter[torch.dtype] = Counter()
        for shape, dtype in tensors:
            sizes[dtype] += torch.Size(shape).numel() * dtype.itemsize
        return cls(number, sizes)

    def __str__(self) -> str:
        """Returns text such as `12 weights, 1.2 GB of bfloat16 and 3 kB of float32`."""
        parts = (
            f"{decimal_bytes(size)} of {str(dtype).removeprefix('torch.')}" for dtype, size in self.sizes.most_common()
        )
        return f"{self.number} weights, {' and '.join(parts)}"


def of_import(output: Path, written: Written, sources: Iterable[str]) -> str:
    """Returns the closing line of an import.

    Args:
        output: The checkpoint's folder.
        written: The weights written.
        sources: Flags with which `verify` compares the checkpoint with its source; empty where it cannot.
    """
    hf, given = output / "hf", " ".join(sources)
    tokenizer = ""
    if (hf / "tokenizer_config.json").is_file():
        tokenizer = f" --tokenizer-type HuggingFaceTokenizer --tokenizer-model {hf}"
    elif (hf / "tokenizer.model").is_file():
        tokenizer = f" --tokenizer-type SentencePieceTokenizer --tokenizer-model {hf / 'tokenizer.model'}"
    compare = f"Compare it with its source: verify --load {output} {given}. " if given else ""
    return (
        f"{output} is written: {written}; the model's flags in flags.txt, config and tokenizer in hf/. {compare}"
        f"Train from it: pretrain_vlm.py --load {output} --finetune $(cat {output / 'flags.txt'}) --vision-model {hf}"
        f"{tokenizer} ..."
    )


def of_export(output: Path, written: Written, load: Path) -> str:
    """Returns the closing line of an export.

    Args:
        output: The export's folder.
        written: The weights written.
        load: The exported checkpoint's folder.
    """
    code = ", trust_remote_code=True" if any(output.glob("modeling_*.py")) else ""
    return (
        f"{output} is written: {written}, with config and tokenizer. Compare it with the checkpoint: verify --load "
        f'{load} --hf {output}. Load it: AutoModelForImageTextToText.from_pretrained("{output}", dtype="auto"{code}).'
    )
