# SPDX-License-Identifier: Apache-2.0
"""Silences console messages of other packages that the user cannot act on; `--all-messages` shows them.

Every silenced message is listed here by its text. All others are written unchanged, above all errors and tracebacks.
"""

from __future__ import annotations

import builtins
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from megatron_smar.runtime.adaptation import Where, adaptation

ALL_MESSAGES = "--all-messages"

WARNINGS = (
    r"Please specify --split when using --data-path",  # energon makes its own splits
    r"moe_ffn_hidden_size is not set, using ffn_hidden_size",
    r"\s*It is recommended to use a ModelConfig",
    r"MimoModelConfig is experimental",
    r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed\.\w+` instead",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # for experts with ETP 1
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    r"The argument order of load has been changed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"'pin_memory' argument is set as true but no accelerator is found",
)

# Beginnings of the silenced messages, by logger.
LOGGED = {
    "torch.utils.cpp_extension": r"No CUDA runtime is found",
    "megatron.core.num_microbatches_calculator": r"setting number of microbatches to constant",
    "megatron.core.tokenizers.utils.build_tokenizer": r" > padded vocab",
    "megatron.core.rerun_state_machine": r"RerunStateMachine initialized in mode|Result validation enabled",
    "megatron.core.models.gpt.gpt_model": r"GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": r"Setting up DistributedDataParallel",
    "megatron.core.distributed.param_and_grad_buffer": r"Number of buckets for gradient|Using \S+ for gradient",
    "megatron.core.optimizer": r"Setting up optimizer with config",
    "megatron.core.optimizer_param_scheduler": r"> learning rate decay style",
    "megatron.core.dist_checkpointing.strategies.torch": r"MCore's async save is deprecated",
    # The save reports the cause, such as a full disk; these name a consequence of it.
    "megatron.core.dist_checkpointing.strategies.filesystem_async": r"Local worker \d+ encountered|"
    r"An error is caught while starting worker",
    "megatron.core.timers": r"\(min, max\) time across ranks \(ms\):\n\s+(model-and-optimizer-setup|save-checkpoint|"
    r"load-checkpoint|evaluate) ",
}

# Beginnings of the silenced lines that Megatron prints.
PRINTED = re.compile(
    r"\s*(using world size: |Number of virtual stages per pipeline stage: None|using torch\.\w+ for parameters|"
    r"> setting tensorboard|WARNING: one_logger package is required|> initializ(ing|ed) |> setting random seeds|"
    r"> compiling dataset index builder|>>> done with dataset index builder|time to initialize megatron|"
    r"\[(after|before) [\w ,-]+\] datetime: |building VisionLanguageModel|> number of parameters on |"
    r"> building train, validation, and test datasets|> datasets target sizes|(train|validation|test): +\d+$|"
    r"sharded_state_dict metadata loaded from|could not find arguments in the checkpoint| *checkpoint version |"
    r"done with setup|training \.\.\.|Overwriting rerun_state_machine\.current_iteration|"
    r"Number of active parameters in|Number of parameters in |Total number of (active )?parameters in|"
    r"compute_activation_memory_without_sp|"
    r"Activation memory footprint per|Number of in-flight microbatches|Theoretical memory footprints: |"
    r"\[Rank \d+\] \(.*\) memory \(MB\) \| allocated: 0\.00 \||"
    r"init_persistent_async_worker|"
    r"\[[\d :.-]+\] +successfully saved checkpoint)"  # printed before the checkpoint is complete
)

_MODULES = (
    "arguments",
    "checkpointing",
    "global_vars",
    "initialize",
    "theoretical_memory_usage",
    "training",
    "utils.common_utils",
)
_TABLE = re.compile(r"-+ (end of )?arguments -+$")

# Functions that rewrite a line before it is written; `training.console` adds them.
rewrite: list[Callable[[str], str]] = []


class _Table:
    """Whether the printed lines are currently inside Megatron's table of arguments."""

    inside = False


def written(text: str) -> str | None:
    """Returns the text to write for a line that Megatron prints, possibly rewritten, or None to write nothing."""
    table = _TABLE.match(text)
    if table or _Table.inside:
        _Table.inside = not table.group(1) if table else True
        return None
    if not text.strip() or PRINTED.match(text):
        return None
    for change in rewrite:
        text = change(text)
    return text


def _print(*values: Any, **options: Any) -> None:
    text = written(options.get("sep", " ").join(map(str, values)))
    if text is not None:
        builtins.print(text, **options)


class _Unlisted(logging.Filter):
    """Drops records up to WARNING whose message begins with the silenced text."""

    def __init__(self, begin: str) -> None:
        super().__init__()
        self._begin = re.compile(begin)

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is written."""
        return record.levelno > logging.WARNING or not self._begin.match(record.getMessage())


def quiet_loggers() -> None:
    """Silences the listed warnings and log messages; call it before the packages that emit them are imported."""
    if ALL_MESSAGES in sys.argv:
        return
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, begin in LOGGED.items():
        logging.getLogger(name).addFilter(_Unlisted(begin))


@adaptation("a run of four steps prints a thousand lines, most of them a table of arguments", Where.ANYWHERE)
def quiet_prints() -> None:
    """Passes everything that Megatron prints through `written`."""
    if ALL_MESSAGES in sys.argv:
        return
    for name in _MODULES:
        vars(importlib.import_module(f"megatron.training.{name}"))["print"] = _print
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
