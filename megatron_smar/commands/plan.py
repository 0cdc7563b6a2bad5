# SPDX-License-Identifier: Apache-2.0
"""Plans."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smar import runtime

runtime.install_or_exit("cpu")

from transformers import PretrainedConfig

from megatron_smar.conversion.composite import Connection, combine, flags
from megatron_smar.conversion.empty_model import as_argv
from megatron_smar.conversion.upcycle import UpcyclingConfig, mixture_flags


def recipe_config(folder: Path, given: Sequence[str] = ()) -> tuple[PretrainedConfig, list[str]]:
    """Returns the published model of a recipe in examples/, and the trainer's flags that its config does not give.

    Args:
        folder: The recipe's folder.
        given: Flags of the run.
    """
    architecture = _architectures(folder.parent).ARCHITECTURES[folder.name]
    text = architecture.language
    connection = Connection(pixel_shuffle=1.0, feature_layer=-2) if architecture.upcycled else Connection()
    config = combine(text, architecture.vision, connection, text.vocab_size - 1, text.vocab_size)
    mixture: list[str] = []
    if architecture.upcycled:
        experts, chosen, every = architecture.upcycled
        mixture = as_argv(mixture_flags(flags(config), UpcyclingConfig(experts, chosen, every)))
    return config, [*mixture, *given]


def _architectures(examples: Path):
    spec = importlib.util.spec_from_file_location("architectures", examples / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module
