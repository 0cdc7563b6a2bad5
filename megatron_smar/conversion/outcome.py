# SPDX-License-Identifier: Apache-2.0
"""What a conversion has written, in a line, and what is done with it next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_smar.checkpoint.describe import decimal_bytes


@dataclass(frozen=True)
class Written:
    """Weights that were written.

    Attributes:
        number: How many.
        sizes: Bytes of each data type.
    """

    number: int
    sizes: Counter[torch.dtype]

    @classmethod
    def of(cls, number: int, tensors: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> Written:
        """From the shape and type of each tensor."""
        sizes: Counter[torch.dtype] = Counter()
        for shape, dtype in tensors:
            sizes[dtype] += torch.Size(shape).numel() * dtype.itemsize
        return cls(number, sizes)

    def __str__(self) -> str:
        """As `12 weights, 1.2 GB of bfloat16 and 3 kB of float32`."""
        parts = (
            f"{decimal_bytes(size)} of {str(dtype).removeprefix('torch.')}" for dtype, size in self.sizes.most_common()
        )
        return f"{self.number} weights, {' and '.join(parts)}"


def of_import(output: Path, written: Written, sources: Iterable[str]) -> str:
    """The closing line of an import.

    Args:
        output: The checkpoint.
        written: Its weights.
        sources: Flags under which `verify` compares it with what it was made of; none where it cannot.
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
    """The closing line of an export.

    Args:
        output: The folder.
        written: Its weights.
        load: The checkpoint that it was made of.
    """
    code = ", trust_remote_code=True" if any(output.glob("modeling_*.py")) else ""
    return (
        f"{output} is written: {written}, with config and tokenizer. Compare it with the checkpoint: verify --load "
        f'{load} --hf {output}. Load it: AutoModelForImageTextToText.from_pretrained("{output}", dtype="auto"{code}).'
    )
