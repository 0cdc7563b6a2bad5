# SPDX-License-Identifier: Apache-2.0
"""An export, or a language model, in lm-evaluation-harness, through the harness's own `hf` model."""

from __future__ import annotations

from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from megatron_smar.evaluation.chat import open_chat


def open_export(folder: Path, batch_size: int) -> HFLM:
    """Loads an export, or a language model in Hugging Face's format, for the harness.

    The harness's `hf` model would load an export as a language model alone, which transformers does not do with a
    vision-language model; it gets the loaded model instead, and passes text through it.

    Args:
        folder: The model's folder.
        batch_size: Requests per forward pass.

    Raises:
        ValueError: The folder holds no model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: PreTrainedModel
    if is_language_model(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    else:
        chat = open_chat(folder, device=device)
        model, tokenizer = chat.model, chat.processor.tokenizer
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32")


def is_language_model(folder: Path) -> bool:
    """Returns whether transformers knows the folder's model as one of text alone."""
    try:
        kind = type(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError):  # no model, or an export with its own modeling code
        return False
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
