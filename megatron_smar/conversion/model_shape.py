# SPDX-License-Identifier: Apache-2.0
"""The shape of a model that a Hugging Face config describes, from the trainer's own model without weights."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence

from transformers import PretrainedConfig

from megatron_smar.config.build import modality_routing_config, transformer_config, vision_config
from megatron_smar.config.checks import moe_layers
from megatron_smar.config.shape import model_shape, parameters_of
from megatron_smar.conversion.composite import flags
from megatron_smar.conversion.empty_model import as_argv, build_empty, parse
from megatron_smar.planning.shape import ModelShape

# Also Megatron's default; conversions keep the vocabulary of the published model, which a run pads.
VOCABULARY_MULTIPLE = 128


def describe_shape(config: PretrainedConfig, given: Sequence[str] = ()) -> ModelShape:
    """Returns the shape of a composite model with all its parameters.

    Args:
        config: The composite model's config.
        given: Further flags of the trainer: what is frozen, the routing strategy, experts of an upcycled model.

    Raises:
        ValueError: The trainer would refuse the model or the flags.
    """
    with tempfile.TemporaryDirectory() as folder:  # the trainer reads the vision tower's shape from a folder
        config.save_pretrained(folder)
        argv = [*as_argv(flags(config)), "--vision-model", folder, "--bf16", *given]
        return shape_of_flags(argv, config.text_config.vocab_size, VOCABULARY_MULTIPLE)


def shape_of_flags(argv: Sequence[str], vocabulary: int, multiple: int = 1) -> ModelShape:
    """Returns the shape of the model that the trainer's flags describe, with all its parameters.

    Args:
        argv: Flags of the model, --vision-model among them.
        vocabulary: Rows of the output layer without padding.
        multiple: --make-vocab-size-divisible-by of the run.

    Raises:
        ValueError: The trainer would refuse the flags.
    """
    args = parse(argv, vocabulary)
    shape = model_shape(vision_config(args), args.freeze, vocabulary, transformer_config(args))
    routing = modality_routing_config(args)
    tables = [routing.allowed(layer, args.num_experts) for layer in (moe_layers(args) if args.num_experts else [])]
    allowed = tuple(None if table is None else tuple(map(tuple, table.tolist())) for table in tables)
    return dataclasses.replace(
        shape,
        decoder=dataclasses.replace(shape.decoder, vocabulary_multiple=multiple),
        parameters=parameters_of(build_empty(args)),
        modalities=routing.num_modalities,
        strategy=routing.strategy.name,
        allowed_experts=allowed if any(allowed) else (),
    )
