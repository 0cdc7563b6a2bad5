# SPDX-License-Identifier: Apache-2.0
"""An export in lm-evaluation-harness, through the harness's own `hf` model."""

from __future__ import annotations

from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from megatron_smar.evaluation.chat import open_chat


def open_export(folder: Path, batch_size: int) -> HFLM:
    """Loads an export for the harness.

    The harness's `hf` model would load the folder as a language model alone, which transformers does not do with a
    vision-language model; it gets the loaded model instead, and passes text through it.

    Args:
        folder: The export's folder.
        batch_size: Requests per forward pass.

    Raises:
        ValueError: The folder holds no export.
    """
    chat = open_chat(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    return HFLM(
        pretrained=chat.model,
        tokenizer=chat.processor.tokenizer,
        backend="causal",
        batch_size=batch_size,
        softmax_dtype="float32",
    )
