# SPDX-License-Identifier: Apache-2.0
"""Layouts of models published with their own modeling code: VITA, and OpenGVLab's original InternVL and InternViT.

transformers has no classes for them, and none of their code is run: the settings in config.json and the weights' names
are translated to InternVL's layout in transformers. These layouts can only be read; exports have InternVL's layout.

Sources: VITA-MLLM/VITA (vita/model), OpenGVLab/InternVL (internvl_chat/internvl/model/internvl_chat), and for
InternViT's names transformers' own conversion of the checkpoints that it ships.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, InternVLVisionConfig, PretrainedConfig

from megatron_smar.checkpoint.metadata import one_line
from megatron_smar.conversion import composite
from megatron_smar.conversion.architectures import Flags, UnsupportedError
from megatron_smar.conversion.composite import LANGUAGE, PROJECTOR, VISION, Connection
from megatron_smar.conversion.weights import Run, Weight, rows_of

Content = Mapping[str, Any]  # the content of a config.json

# InternViT: part of a weight's name in transformers' InternVLVisionModel -> in the original; applied in this order.
TOWER_NAMES = {
    "encoder.layer.": "encoder.layers.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.": ".attn.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_": ".ls",
}
QUERY_KEY_VALUE = re.compile(r"(.*\.attn\.)([qkv])_proj(\..*)")
# Defaults of the original InternVisionConfig, which are InternViT-6B's.
TOWER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}


def is_tower(content: Content) -> bool:
    """Returns whether a config.json is an original InternViT's, or an original InternVL's, which contains one."""
    return content.get("model_type") in ("intern_vit_6b", "internvl_chat")


def tower_config(content: Content) -> InternVLVisionConfig:
    """Returns the config with which transformers' vision model computes what an original InternViT computes.

    The original's stochastic depth (`drop_path_rate`) has no counterpart; it has an effect in training only.

    Args:
        content: config.json of an original InternViT, or `vision_config` of an original InternVL.

    Raises:
        UnsupportedError: A setting has no counterpart.
    """
    fields = {name: content.get(name, default) for name, default in TOWER_DEFAULTS.items()}
    use_qk_norm = content.get("qk_normalization", True)
    if use_qk_norm and fields["layer_norm_eps"] != 1e-6:  # fixed in transformers' class
        raise UnsupportedError(
            f"layer_norm_eps is {fields['layer_norm_eps']} with qk_normalization in the config of this InternViT; "
            "only 1e-06 can be trained here."
        )
    with _translated_errors("vision tower"):
        return InternVLVisionConfig(
            **fields,
            use_qk_norm=use_qk_norm,
            attention_bias=content.get("qkv_bias", False),
            projection_dropout=content.get("dropout", 0.0),
            layer_scale_init_value=content.get("initializer_factor", 0.1),
            use_mean_pooling=True,  # no norm after the last layer
        )


@contextlib.contextmanager
def _translated_errors(part: str) -> Iterator[None]:
    """Raises errors of transformers' config classes as `UnsupportedError`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UnsupportedError(
            f"transformers cannot read the config of this model's {part} ({one_line(error)})."
        ) from error


def tower_weights(tower: PretrainedConfig, prefix: str) -> list[Weight]:
    """Returns the weight table of an original InternViT, which stores queries, keys and values as one tensor.

    Args:
        tower: The tower's config, as `tower_config` returns it.
        prefix: Prefix of the tower's weights' names.
    """
    return [_tower_weight(row, prefix, tower.hidden_size) for row in composite.vision_weights(tower)]


def _tower_weight(row: Weight, prefix: str, hidden_size: int) -> Weight:
    """Returns a row of the vision tower's table, changed to read the original InternViT's tensor."""
    name = prefix + row.hf[0].removeprefix(VISION)
    for here, original in TOWER_NAMES.items():
        name = name.replace(here, original)
    part = QUERY_KEY_VALUE.fullmatch(name)
    if part is None:
        return replace(row, hf=(name,))
    first = "qkv".index(part[2]) * hidden_size
    # This weight is a third of the fused qkv tensor, [3h, ...]. The importer's `_shape_problem` expects a tensor to end
    # where its last run ends. A run of no rows at row 3h sets that end, and adds nothing to the weight.
    end_of_qkv = Run(0, 3 * hidden_size, 0)
    return replace(row, hf=(f"{part[1]}qkv{part[3]}",), runs=(*rows_of(first, hidden_size), end_of_qkv))


@dataclass(frozen=True)
class Layout:
    """The layout in which a composite model is published.

    Attributes:
        names: Prefix in InternVL's naming on disk -> prefix in this layout; names without such a prefix are identical.
        tower: Prefix of the vision tower's weights in this layout.
        text: Builds the language model's config from config.json.
        connection: Reads from config.json how vision features reach the language model.
        tiles: Builds the tiling flags that the model was trained with from config.json.
        left_out: Prefix of weights that the trainer has no place for; None if there are none.
    """

    names: Mapping[str, str]
    tower: str
    text: Callable[[Content], PretrainedConfig]
    connection: Callable[[Content], Connection]
    tiles: Callable[[Content], Flags]
    left_out: str | None = None

    def text_config(self, content: Content, names: Collection[str]) -> PretrainedConfig:
        """Returns the language model's config.

        Args:
            content: The content of config.json.
            names: Names of the stored weights. A stored output layer is untied, whatever config.json says (InternVL's
                code unties it).
        """
        text = self.text(content)
        text.tie_word_embeddings = text.tie_word_embeddings and self._name(LANGUAGE + "lm_head.weight") not in names
        return text

    def weights(self, config: PretrainedConfig) -> list[Weight]:
        """Returns a composite model's weight table in this layout; the vision tower's rows are not translated."""
        rows = composite.weights(config, biases=False)
        return [replace(row, hf=tuple(map(self._name, row.hf))) for row in rows]

    def _name(self, name: str) -> str:
        for internvl, original in self.names.items():
            if name.startswith(internvl):
                return original + name.removeprefix(internvl)
        return name


def _require(content: Content, field: str, default: Any, *allowed: Any) -> None:
    value = content.get(field, default)
    if value not in allowed:
        raise UnsupportedError(
            f"{field} is {value!r} in the config of this {content['model_type']} model; only "
            f"{' or '.join(map(repr, allowed))} can be trained here."
        )


def _text_config(kind: str, fields: Content) -> PretrainedConfig:
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"the language model's type is {kind!r}, which transformers does not know; supported are "
            f"{composite.supported()}."
        )
    with _translated_errors("language model"):
        return CONFIG_MAPPING[kind].from_dict({name: value for name, value in fields.items() if name != "auto_map"})


def _tiles(fewest: int, most: int, thumbnail: bool) -> Flags:
    return {"min-tiles": fewest, "max-tiles": most, "use-thumbnail": thumbnail and most > 1}


def _internvl_text(content: Content) -> PretrainedConfig:
    language = content.get("llm_config", {})
    return _text_config(language.get("model_type", ""), language)


def _internvl_connection(content: Content) -> Connection:
    _require(content, "ps_version", "v1", "v2")  # version 1 transposes the image
    size = content.get("vision_config", {}).get("image_size", TOWER_DEFAULTS["image_size"])
    _require(content, "force_image_size", None, None, size)
    return Connection("internvl", content.get("downsample_ratio", 0.5), content.get("select_layer", -1))


def _internvl_tiles(content: Content) -> Flags:
    if not content.get("dynamic_image_size", False):
        return _tiles(1, 1, False)
    fewest, most = content.get("min_dynamic_patch", 1), content.get("max_dynamic_patch", 6)
    return _tiles(fewest, most, content.get("use_thumbnail", False))


# VITA's config.json is its language model's with additional fields. VITA's model type -> the language model's.
VITA_LANGUAGES = {"vita-mixtral": "mixtral", "vita-Qwen2": "qwen2"}
VITA_FIELD = re.compile(r".*mm_.*|.*freeze.*|tokenizer_.*|image_aspect_ratio|continuous_training|use_s2")


def _vita_text(content: Content) -> PretrainedConfig:
    own = {name: value for name, value in content.items() if not VITA_FIELD.fullmatch(name)}
    kind = VITA_LANGUAGES[content["model_type"]]
    return _text_config(kind, own | {"model_type": kind, "architectures": None})


def _vita_connection(content: Content) -> Connection:
    """Returns VITA's connection: InternViT's last layer, its features halved before the pixel shuffle.

    Source: vita/model/multimodal_encoder/internvit/internvit_encoder.py.
    """
    _require(content, "mm_projector_type", "mlp2x_gelu", "mlp2x_gelu")
    tower = str(content.get("mm_vision_tower", "internvit"))
    if "internvit" not in tower.lower():
        raise UnsupportedError(
            f"mm_vision_tower is {tower!r} in the config of this {content['model_type']} model; only an InternViT can "
            "be trained here in VITA's layout."
        )
    return Connection("mlp2x_gelu", pixel_shuffle=0.5, feature_layer=-1, feature_scale=0.5)


VITA = Layout(
    names={
        LANGUAGE: "",
        PROJECTOR + "linear_1.": "model.mm_projector.0.",
        PROJECTOR + "linear_2.": "model.mm_projector.2.",
    },
    tower="model.vision_tower.vision_tower.",
    text=_vita_text,
    connection=_vita_connection,
    tiles=lambda content: _tiles(1, 12, True),  # from VITA's training code and programs; config.json does not say
    left_out="model.audio_encoder.",
)
INTERNVL = Layout(
    names={
        PROJECTOR + "layer_norm.": "mlp1.0.",
        PROJECTOR + "linear_1.": "mlp1.1.",
        PROJECTOR + "linear_2.": "mlp1.3.",
    },
    tower="vision_model.",
    text=_internvl_text,
    connection=_internvl_connection,
    tiles=_internvl_tiles,
)
LAYOUTS: dict[str, Layout] = {"internvl_chat": INTERNVL, **dict.fromkeys(VITA_LANGUAGES, VITA)}
