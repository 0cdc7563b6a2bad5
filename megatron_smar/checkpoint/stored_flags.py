# SPDX-License-Identifier: Apache-2.0
"""The flags of a checkpoint's model, from the arguments stored with it: for programs that run the model untrained."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_smar import runtime
from megatron_smar.checkpoint.location import locate
from megatron_smar.checkpoint.metadata import run_arguments
from megatron_smar.checkpoint.model_identity import FUNCTION
from megatron_smar.routing.strategies import stored_strategy

# Besides what the model computes (`FUNCTION`), a program that runs it needs its inputs, its precision and its files.
# Parallel layout, batches, fused kernels and expert capacity are the program's own choice.
_RUNNING = (
    "group_query_attention",
    "max_position_embeddings",
    "seq_length",
    "modality_router_bias",
    "image_modalities",
    "smar_eps",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_router_dtype",
    "bf16",
    "fp16",
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "make_vocab_size_divisible_by",
    "conversation_template",
    "min_tiles",
    "max_tiles",
    "use_thumbnail",
    "vision_model",
    "tokenizer_type",
    "tokenizer_model",
    "tiktoken_pattern",
)  # not trust_remote_code: a stranger's checkpoint would switch on the code of the tokenizer that it names
# Fused kernels that a run had to switch off stay off; whether the others can be used depends on the machine.
_FUSIONS = (
    "apply_rope_fusion",
    "bias_dropout_fusion",
    "bias_gelu_fusion",
    "bias_swiglu_fusion",
    "masked_softmax_fusion",
)
# Text in a tokenizer's chat template -> the conversation template that it belongs to.
_TEMPLATE_MARKS = {"<|im_start|>": "chatml", "[INST]": "mistral", "USER:": "vicuna_v1"}


def stored_flags(argv: Sequence[str], asks: bool = True) -> dict[str, Any]:
    """Returns argument values for running the model in --load, as the parser's defaults: flags that are given win.

    An import stores no run's arguments: its tokenizer is the one in its `hf` folder, and its conversation template the
    one that the tokenizer's chat template belongs to.

    Args:
        argv: The command line.
        asks: Whether the model is asked questions, for which it needs a conversation template.

    Returns:
        Values by argument name; empty where --load has no checkpoint, which is refused when the program starts.

    Raises:
        ValueError: The checkpoint cannot be read, or a value is neither stored nor given.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (
        "--load",
        "--vision-model",
        "--tokenizer-type",
        "--tokenizer-model",
        "--conversation-template",
        "--modality-routing",
    ):
        parser.add_argument(flag)
    parser.add_argument("--ckpt-step", type=int)
    given, _ = parser.parse_known_args(argv)
    if not given.load or locate("--load", given.load, given.ckpt_step).checkpoint is None:
        return {}
    arguments = run_arguments(Path(given.load), given.ckpt_step)
    saved = vars(arguments)
    flags = {name: saved[name] for name in (*FUNCTION, *_RUNNING) if name in saved}
    if given.modality_routing is None:  # the stored settings do not apply to another strategy
        flags |= strategy_flags(arguments)
    flags |= {name: False for name in _FUSIONS if saved.get(name) is False}
    if runtime.device() == "cuda" and saved.get("moe_grouped_gemm"):
        flags["moe_grouped_gemm"] = True
    if not flags:
        return {}  # the checkpoint stores no arguments: they must be given
    is_import = str(flags.get("tokenizer_type", "")).startswith("Null")
    if is_import:
        flags |= _tokenizer_of_import(given, Path(str(flags["vision_model"])))
    _check_places(given, flags)
    # `plain` is stage 1's template: it drops everything of a question but its images.
    if asks and not given.conversation_template and (is_import or flags.get("conversation_template") == "plain"):
        flags["conversation_template"] = _template_of_tokenizer(given, flags, is_import)
    return flags


def strategy_flags(saved: Namespace) -> dict[str, Any]:
    """Returns the routing strategy's arguments that a trained model needs; empty if its weights are sufficient.

    Args:
        saved: The run's arguments.
    """
    strategy = stored_strategy(saved)
    if not (strategy.of_inference or strategy.gate_per_modality):
        return {}
    values = {f"{strategy.name}_{field}": getattr(strategy, field) for field in strategy.of_inference}
    return {"modality_routing": strategy.name} | values


def _tokenizer_of_import(given: Namespace, folder: Path) -> dict[str, Any]:
    if given.tokenizer_type or given.tokenizer_model:
        return {"tokenizer_type": None, "tokenizer_model": None}
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    if (folder / "tokenizer.model").is_file():
        return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(folder / "tokenizer.model")}
    raise ValueError(
        f"--load {given.load} is an import, and its folder {folder} has no tokenizer; give --tokenizer-type and "
        "--tokenizer-model."
    )


def _check_places(given: Namespace, flags: dict[str, Any]) -> None:
    """Refuses stored paths that no longer exist; a value that could be the name of a model on the Hub passes."""
    for dest in ("vision_model", "tokenizer_model"):
        path, is_given = flags.get(dest), getattr(given, dest)
        is_file = os.path.isabs(str(path)) or str(path).endswith(".model")
        if path and not is_given and is_file and not Path(path).exists():
            flag = f"--{dest.replace('_', '-')}"
            raise ValueError(f"--load {given.load} was saved with {flag} {path}, which is not there; give {flag}.")


def _template_of_tokenizer(given: Namespace, flags: dict[str, Any], is_import: bool) -> str:
    folder = Path(str(given.tokenizer_model or flags.get("tokenizer_model")))
    if (folder / "tokenizer_config.json").is_file():
        text = str(AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template or "")
        for mark, name in _TEMPLATE_MARKS.items():
            if mark in text:
                return name
    why = "is an import" if is_import else "was trained with --conversation-template plain, which leaves questions out"
    raise ValueError(
        f"--load {given.load} {why}, and its tokenizer does not say how a question is put: give "
        "--conversation-template, as training on it will have it (mistral, vita, vicuna_v1 or chatml)."
    )
