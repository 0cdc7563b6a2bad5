# SPDX-License-Identifier: Apache-2.0
"""Vision encoder, connector and language model as one Hugging Face model, in InternVL's layout for any parts.

Everything is read and written under the names of an `InternVLForConditionalGeneration` on disk: `language_model.` plus
the names of a causal language model, `vision_tower.` plus the names of a vision model, and `multi_modal_projector.`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    InternVLConfig,
    PretrainedConfig,
)

from megatron_smar.checkpoint.metadata import one_line
from megatron_smar.conversion.architectures import LANGUAGES, Flags, UnsupportedError, language_of
from megatron_smar.conversion.architectures.common import refuse
from megatron_smar.conversion.weights import Weight, generator_of
from megatron_smar.huggingface import MODEL_TYPE, PLAIN_TYPE, RemoteFields
from megatron_smar.huggingface.modeling_modality_aware import ModalityAwareInternVLConfig
from megatron_smar.model.connector import ConnectorType
from megatron_smar.model.vision import NORMALIZATION, side_in_pixels
from megatron_smar.routing.modalities import VISION as VISION_MODALITY

LANGUAGE, VISION, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
TOWER = "vision_model.tower."  # prefix of the vision tower's weights in the trainer
# Model types that are published with their own modeling code; `original_layouts.py` reads them.
ORIGINAL_TYPES = ("internvl_chat", "intern_vit_6b", "vita-mixtral", "vita-Qwen2")
ROUTER = re.compile(r"(.*\.mlp\.router)\.weight")
MODALITY_GATE = ".modality_weight_"  # in the name of a modality's gate on disk, before the modality's id
# Prefixes of the weights' names in memory, which newer files of the same model use -> prefixes on disk.
IN_MEMORY = {
    "model.language_model.": LANGUAGE + "model.",
    "lm_head.": LANGUAGE + "lm_head.",
    "model." + VISION: VISION,
    "model." + PROJECTOR: PROJECTOR,
}
# Buffers that older versions of transformers saved; they are computed, not trained.
COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def load_config(folder: Path | str) -> PretrainedConfig:
    """Reads the config of a Hugging Face folder, also of this project's exports, without running the folder's code.

    Raises:
        UnsupportedError: There is no config, or transformers does not know its model type.
    """
    content = read_content(folder)
    kind = content.get("model_type")
    if kind in ORIGINAL_TYPES:
        raise UnsupportedError(
            f"{folder} has the model type {kind!r}, a layout that is only read, by import and upcycle as --hf (a tower "
            "as --vision); elsewhere give the import's hf/, or an export."
        )
    try:
        if kind == MODEL_TYPE:
            config = ModalityAwareInternVLConfig.from_pretrained(folder)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedError(
            f"{Path(folder) / 'config.json'} is of the model type {kind!r}, and transformers cannot read it "
            f"({one_line(error)}); supported are {supported()}."
        ) from error
    _remove_auto_map(config)
    if kind in (PLAIN_TYPE, MODEL_TYPE):
        text: Any = config.text_config
        if "tie_word_embeddings" not in content:  # older files set it in text_config only
            config.tie_word_embeddings = text.tie_word_embeddings
        text.tie_word_embeddings = config.tie_word_embeddings  # the composite config wins
    return config


def _remove_auto_map(config: PretrainedConfig) -> None:
    """Removes `auto_map`, which would be saved with the config although the code that it names is not copied."""
    config.__dict__.pop("auto_map", None)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            _remove_auto_map(part)


def load_composite(folder: Path | str) -> PretrainedConfig:
    """Reads the config of a composite model's folder.

    Raises:
        UnsupportedError: There is no config, or it is not a composite model's.
    """
    config = load_config(folder)
    if config.model_type not in (PLAIN_TYPE, MODEL_TYPE):
        raise UnsupportedError(
            f"--hf {folder} is a {config.model_type} model; it takes {supported()}. Give a language model without "
            "vision as --language, and a vision encoder with it as --vision."
        )
    return config


def read_content(folder: Path | str) -> dict[str, Any]:
    """Returns the content of a Hugging Face folder's config.json.

    Raises:
        UnsupportedError: The file is missing or damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(f"{path} is not a JSON object ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise UnsupportedError(f"{path} is not a JSON object (it holds a {type(content).__name__}); fetch it again.")
    return content


def supported() -> str:
    """Lists what can be converted, for an error message."""
    languages, towers = ", ".join(sorted(LANGUAGES)), ", ".join(NORMALIZATION)
    return (
        f"{PLAIN_TYPE} with a language model of the type {languages}, or one of these with a tower of {towers}; import "
        f"and upcycle also read {', '.join(ORIGINAL_TYPES)}"
    )


@dataclass(frozen=True)
class Connection:
    """How vision features reach the language model.

    Attributes:
        connector: The trainer's --connector.
        pixel_shuffle: The trainer's --pixel-shuffle.
        feature_layer: The trainer's --vision-feature-layer.
        feature_scale: The trainer's --vision-feature-scale.
    """

    connector: ConnectorType = "mlp2x_gelu"
    pixel_shuffle: float = 0.5
    feature_layer: int = -1
    feature_scale: float = 1.0


def tower_of(vision: PretrainedConfig) -> PretrainedConfig:
    """Returns the config of a vision tower, given the tower's config or that of a model with a vision tower.

    Raises:
        UnsupportedError: The tower's model type is not supported.
    """
    tower: PretrainedConfig = getattr(vision, "vision_config", vision)
    if tower.model_type not in NORMALIZATION:
        raise UnsupportedError(
            f"the vision tower's type is {tower.model_type!r}; supported: {', '.join(NORMALIZATION)}."
        )
    return tower


def combine(
    language: PretrainedConfig, vision: PretrainedConfig, connection: Connection, image_token_id: int, vocab_size: int
) -> PretrainedConfig:
    """Returns the config of the composite model made of a separate language model and vision tower.

    Args:
        language: Config of a causal language model.
        vision: Config of a vision tower, or of a model with a vision tower.
        connection: How vision features reach the language model.
        image_token_id: Id of the placeholder for one vision token.
        vocab_size: Number of the tokenizer's tokens; the model's vocabulary grows to it if it is smaller.
    """
    language_of(language)  # refuses unsupported language models
    tower = tower_of(vision)
    text = type(language).from_dict(language.to_dict() | {"vocab_size": max(language.vocab_size, vocab_size)})
    fields = RemoteFields(
        projector_layer_norm=connection.connector == "internvl",
        vision_feature_scale=connection.feature_scale,
        lm_head_bias=text.model_type == "phi",
    )
    kind = InternVLConfig if fields == RemoteFields() and tower.model_type == "internvl_vision" else None
    return (kind or ModalityAwareInternVLConfig)(
        text_config=text,
        vision_config=tower,
        image_token_id=image_token_id,
        downsample_ratio=connection.pixel_shuffle,
        vision_feature_layer=connection.feature_layer,
        vision_feature_select_strategy=selection_of(tower),
        tie_word_embeddings=language.tie_word_embeddings,
        **({} if kind else vars(fields)),
    )


def selection_of(tower: PretrainedConfig) -> str:
    """Returns which of a tower's features are used: all but the class token's; SigLIP has no class token."""
    return "full" if tower.model_type == "siglip_vision_model" else "default"


def with_text(config: PretrainedConfig, text: PretrainedConfig) -> PretrainedConfig:
    """Returns a composite model's config with its language model's config replaced."""
    return type(config).from_dict(config.to_dict() | {"text_config": text.to_dict()})


def connection_of(config: PretrainedConfig) -> Connection:
    """Returns how a composite model's vision features reach its language model."""
    return Connection(
        "internvl" if getattr(config, "projector_layer_norm", True) else "mlp2x_gelu",
        config.downsample_ratio,
        config.vision_feature_layer,
        getattr(config, "vision_feature_scale", 1.0),
    )


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a composite model, but for --vision-model, which names a folder."""
    connection = connection_of(config)
    refuse(config, projector_hidden_act="gelu", vision_feature_select_strategy=selection_of(config.vision_config))
    if not isinstance(connection.feature_layer, int):
        raise UnsupportedError(
            f"vision_feature_layer is {connection.feature_layer!r} in the config of this {config.model_type} model; "
            "only one layer's features can be trained on here."
        )
    return language_of(config.text_config).flags(config.text_config) | {
        "image-size": side_in_pixels(config.vision_config.image_size),
        "connector": connection.connector,
        "pixel-shuffle": connection.pixel_shuffle,
        "vision-feature-layer": connection.feature_layer,
        "vision-feature-scale": connection.feature_scale,
    }


def weights(
    config: PretrainedConfig, biases: bool, connector_seed: int | None = None, gates: bool = False
) -> list[Weight]:
    """Returns the weight table of a composite model.

    Args:
        config: The composite model's config.
        biases: Whether the Hugging Face model has modality biases; otherwise they are new, and zero.
        connector_seed: Seed of a new connector; None where the Hugging Face model has a connector.
        gates: Whether each modality has a gate of its own.
    """
    language = [row.prefixed(LANGUAGE, LANGUAGE) for row in language_of(config.text_config).weights(config.text_config)]
    text = in_float32(language, config.text_config, MODEL_FOR_CAUSAL_LM_MAPPING)
    return [
        *text,
        *modality_biases(language, biases),
        *(modality_gates(text) if gates else []),
        *in_float32(vision_weights(config.vision_config), config.vision_config, MODEL_MAPPING),
        *connector_weights(connection_of(config).connector, connector_seed),
    ]


def in_float32(rows: list[Weight], config: PretrainedConfig, classes: Mapping[Any, Any]) -> list[Weight]:
    """Marks the weights that transformers' class never keeps in half precision, so that they stay in float32.

    Args:
        rows: The weight table of a part of the composite model.
        config: The part's config.
        classes: transformers' model classes by config class.
    """
    kind = classes[type(config)]
    kept = {*(kind._keep_in_fp32_modules or ()), *(kind._keep_in_fp32_modules_strict or ())}
    return [replace(row, keeps_float32=any(part in name for name in row.hf for part in kept)) for row in rows]


def modality_biases(language: list[Weight], stored: bool) -> list[Weight]:
    """Returns a table row for the modality bias of each router.

    Args:
        language: The language model's table.
        stored: Whether the Hugging Face model has the biases; otherwise they are new, and zero.
    """
    rows = []
    for row in language:
        router = ROUTER.fullmatch(row.megatron)
        if router:
            name = f"{router[1]}.modality_bias.bias"
            hf = (row.hf[0].removesuffix("weight") + "modality_bias",) if stored else ()
            make = None if stored else (lambda shape, dtype: torch.zeros(shape))
            rows.append(Weight(name, hf, make=make, dtype=torch.float32))
    return rows


def modality_gates(language: list[Weight]) -> list[Weight]:
    """Returns a table row for vision's gate of each router; text's is the language model's own.

    Args:
        language: The language model's table, whose gates the rows are like.
    """
    rows = []
    for row in language:
        router = ROUTER.fullmatch(row.megatron)
        if router:
            hf = row.hf[0].removesuffix(".weight") + f"{MODALITY_GATE}{VISION_MODALITY}"
            rows.append(replace(row, megatron=f"{router[1]}.strategy.gates.{VISION_MODALITY}.weight", hf=(hf,)))
    return rows


def vision_weights(tower: PretrainedConfig) -> list[Weight]:
    """Returns the vision tower's table; the trainer uses transformers' class, so names differ in the prefix only."""
    with torch.device("meta"):
        names = list(AutoModel.from_config(tower).state_dict())
    return [Weight(TOWER + name, (VISION + name,)) for name in names]


def connector_weights(connector: ConnectorType, seed: int | None) -> list[Weight]:
    """Returns the connector's table.

    Args:
        connector: The trainer's --connector.
        seed: Seed of a new connector (see `fresh_layer`); None for a connector that is read.
    """
    rows = []
    for layer, hf in (("norm", "layer_norm"), ("linear_1", "linear_1"), ("linear_2", "linear_2")):
        if layer == "norm" and connector != "internvl":
            continue
        for kind in ("weight", "bias"):
            name = f"connector.{layer}.{kind}"
            read = Weight(name, (f"{PROJECTOR}{hf}.{kind}",))
            rows.append(read if seed is None else Weight(name, make=partial(fresh_layer, name, seed)))
    return rows


def fresh_layer(name: str, seed: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Initializes a weight of a new connector: LayerNorm to one and zero, a linear layer to uniform weights, zero bias.

    The uniform distribution is that of torch's linear layers.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if name == "connector.norm.weight":
        return torch.ones(shape, dtype=dtype)
    weight = torch.empty(shape)
    nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator_of(name, seed))
    return weight.to(dtype)


def canonical(name: str) -> str:
    """Returns a weight's name in InternVL's layout on disk."""
    for prefix, replacement in IN_MEMORY.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def part_of(names: Mapping[str, Any], part: str, tower: PretrainedConfig | None = None) -> dict[str, str]:
    """Returns the names of one part's weights in InternVL's layout, by their names in the folder that holds the part.

    Args:
        names: Names of the tensors in the folder.
        part: `LANGUAGE` or `VISION`.
        tower: The vision tower's config, for `VISION`.
    """
    if part == LANGUAGE:
        return {name: LANGUAGE + name for name in names}
    wanted = [row.hf[0].removeprefix(VISION) for row in vision_weights(tower)] if tower is not None else []
    prefixes = ("", "vision_model.", VISION, "model." + VISION)
    found = {}
    for prefix in prefixes:
        if wanted and prefix + wanted[0] in names:
            # The folder of a model with a vision tower has other weights too, which are ignored.
            found = {n: VISION + n.removeprefix(prefix) for n in names if not prefix or n.startswith(prefix)}
            break
    return found
