# SPDX-License-Identifier: Apache-2.0
"""Modeling code for exports with parts that transformers' own InternVL does not have.

`modeling_modality_aware.py` is copied unchanged next to an export's weights, so it imports nothing of this project.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CODE = Path(__file__).with_name("modeling_modality_aware.py")
PLAIN_TYPE, PLAIN_CLASS = "internvl", "InternVLForConditionalGeneration"
MODEL_TYPE, MODEL_CLASS = "modality_aware_internvl", "ModalityAwareInternVLForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": f"{CODE.stem}.ModalityAwareInternVLConfig",
    "AutoModel": f"{CODE.stem}.ModalityAwareInternVLModel",
    "AutoModelForImageTextToText": f"{CODE.stem}.{MODEL_CLASS}",
    # Tools for text-only models look this class up; the plain class is not in transformers' list of causal LMs.
    "AutoModelForCausalLM": f"{CODE.stem}.{MODEL_CLASS}",
}


@dataclass(frozen=True)
class RemoteFields:
    """Fields of an exported config.json that transformers' InternVL lacks; with all defaults the model is InternVL.

    Attributes:
        modality_router_bias: Whether each gate has a bias per modality, `...gate.modality_bias` [M, E] float32.
        modality_gates: Whether each modality m but text has a gate of its own, `...gate.modality_weight_<m>` [E, h].
        num_modalities: Number of modalities, M.
        projector_layer_norm: Whether the projector begins with a LayerNorm.
        vision_feature_scale: Multiplies the vision features before the pixel shuffle.
        lm_head_bias: Whether the output layer has a bias, as Phi's has.
    """

    modality_router_bias: bool = False
    modality_gates: bool = False
    num_modalities: int = 2
    projector_layer_norm: bool = True
    vision_feature_scale: float = 1.0
    lm_head_bias: bool = False


def needs_remote_code(config: Mapping[str, Any], fields: RemoteFields) -> bool:
    """Returns whether the plain class would compute something else.

    Args:
        config: config.json of a composite model.
        fields: The exported model's fields. Biases that are all zero need not be exported: pass
            `modality_router_bias=False` and leave them out.
    """
    own_tower = config["vision_config"].get("model_type", "internvl_vision") == "internvl_vision"
    return (
        fields.modality_router_bias
        or fields.modality_gates
        or not fields.projector_layer_norm
        or fields.vision_feature_scale != 1.0
        or fields.lm_head_bias
        or not own_tower  # InternVLConfig reads any vision_config as InternViT's
    )


def write_remote_code(folder: Path, config: Mapping[str, Any], fields: RemoteFields) -> dict[str, Any]:
    """Copies the modeling code into an export's folder.

    Args:
        folder: The export's folder, which must exist.
        config: config.json of the composite model, plain or from an earlier export.
        fields: The exported model's fields.

    Returns:
        The export's config.json for the caller to write, with model type, architecture, `auto_map` and `fields`.

    Raises:
        ValueError: `config` is not InternVL's.
    """
    if config.get("model_type") not in (PLAIN_TYPE, MODEL_TYPE):
        raise ValueError(
            f"config.json has model_type {config.get('model_type')!r}; modality biases are exported with a composite "
            f"model of type {PLAIN_TYPE}."
        )
    shutil.copyfile(CODE, folder / CODE.name)
    return (
        dict(config) | asdict(fields) | {"model_type": MODEL_TYPE, "architectures": [MODEL_CLASS], "auto_map": AUTO_MAP}
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without what `write_remote_code` added, i.e. the plain class's.

    Args:
        config: config.json of an export, with or without modeling code.
    """
    if config.get("model_type") != MODEL_TYPE:
        return dict(config) | {"architectures": [PLAIN_CLASS]}
    plain = {name: value for name, value in config.items() if name not in {"auto_map", *RemoteFields().__dict__}}
    return plain | {"model_type": PLAIN_TYPE, "architectures": [PLAIN_CLASS]}


def register() -> None:
    """Makes transformers' Auto classes load such exports with this package's code; code in their folders is not run."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from megatron_smar.huggingface import modeling_modality_aware as code

    AutoConfig.register(MODEL_TYPE, code.ModalityAwareInternVLConfig, exist_ok=True)
    AutoModel.register(code.ModalityAwareInternVLConfig, code.ModalityAwareInternVLModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(
            code.ModalityAwareInternVLConfig, code.ModalityAwareInternVLForConditionalGeneration, exist_ok=True
        )
