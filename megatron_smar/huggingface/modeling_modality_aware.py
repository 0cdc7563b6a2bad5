# SPDX-License-Identifier: Apache-2.0
"""InternVL with what a modality-aware model has beyond it; torch and transformers (5.23 or newer) are all it needs.

A folder with this file beside its weights loads with `trust_remote_code=True`. Added to transformers' own classes:

- a bias per modality on the logits of each MoE layer's gate, before the gate's own softmax or sigmoid and top-k
  (SMAR, equations 1 and 2): logits = g(x) + b[m], b [M, E] in float32, m = 1 where the vision encoder fills the
  position (`input_ids == image_token_id`), 0 elsewhere;
- a projector without LayerNorm, features scaled before the pixel shuffle, CLIP and SigLIP as vision towers.

Weights have the names of the plain model on disk, and each bias stands beside its gate as `...gate.modality_bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, InternVLConfig, InternVLForConditionalGeneration, InternVLModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLPreTrainedModel

# Text models whose gate, `layers.N.mlp.gate`, computes its logits by one linear layer without a bias of its own, of
# `weight` [E, hidden_dim], and returns (logits, weights, indices).
TEXT_MODELS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


class ModalityAwareInternVLConfig(InternVLConfig):
    """InternVL's configuration and these fields.

    Attributes:
        num_modalities: M, the rows of each bias: text, vision, and further ones that no tool fills yet.
        modality_router_bias: Whether the gates have the bias.
        projector_layer_norm: Whether the projector begins with a LayerNorm, as InternVL's does.
        vision_feature_scale: Multiplies the vision features before the pixel shuffle; VITA's checkpoints use 0.5.
        lm_head_bias: Whether the output layer has a bias, as Phi's has.
    """

    model_type = "modality_aware_internvl"
    _auto_class = "AutoConfig"  # save_pretrained then copies this file
    sub_configs_defaults = {  # noqa: RUF012 - transformers reads the class attribute, where InternVL fixes its own tower
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="mixtral"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="internvl_vision"),
    }

    num_modalities: int = 2
    modality_router_bias: bool = True
    projector_layer_norm: bool = True
    vision_feature_scale: float = 1.0
    lm_head_bias: bool = False


class OnLogits:
    """A gate as its own `forward` sees it, but for one thing: what it is given are the logits already.

    The identity in the place of its weight makes the gate's linear layer hand them through.
    """

    def __init__(self, gate: nn.Module, logits: Tensor) -> None:
        self.gate = gate
        self.weight = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        self.hidden_dim = logits.shape[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)


class ModalityGate(nn.Module):
    """Goes before a text model's own gate class: the logits get the bias of each token's modality."""

    modality_bias: nn.Parameter  # [M, E] float32
    modality_ids: Tensor | None = None  # [b, s], of the forward pass under way
    own_forward: Callable[..., Any]  # the own class's, not bound

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate's logits [b * s, E], the weights of the experts chosen and their numbers [b * s, top_k]."""
        if self.modality_ids is None:
            raise ValueError("The gate was called outside of its decoder layer, which tells it the tokens' modalities.")
        logits, _, _ = self.own_forward(self, hidden_states)
        # The sum is in float32 where the linear layer is in bfloat16, as the trainer's is.
        logits = logits + self.modality_bias[self.modality_ids.reshape(-1).to(logits.device)]
        return self.own_forward(OnLogits(self, logits), logits)


class ModalityLayer(nn.Module):
    """Goes before a text model's own decoder layer class: hands the modality ids to the gate.

    They come as an argument of the layer and not from the model, so that a recomputed layer sees its own batch's.
    """

    def forward(self, *args: Any, modality_ids: Tensor, **kwargs: Any) -> Any:
        """As the own class's, with `modality_ids` [b, s]."""
        if gate := getattr(self.mlp, "gate", None):  # some layers of a text model may be dense
            gate.modality_ids = modality_ids
        return super().forward(*args, **kwargs)


class ModalityTextModel(nn.Module):
    """Goes before a text model's own class: biases that a checkpoint does not have start at zero."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, ModalityGate):
            init.zeros_(module.modality_bias)


def extend(module: nn.Module, extension: type[nn.Module]) -> None:
    """Puts a class before the module's own; the name stays, since transformers and others look classes up by it."""
    own = type(module)
    attributes = {"__module__": own.__module__, "own_forward": staticmethod(own.forward)}
    module.__class__ = type(own.__name__, (extension, own), attributes)


def add_modality_biases(text_model: Any, num_modalities: int) -> None:
    """Gives each gate of a text model its bias [M, E], zero.

    Raises:
        ValueError: The text model is none whose gates are known.
    """
    if text_model.config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"modality_router_bias is true, and the text model is {text_model.config.model_type!r}; the gates "
            f"known here are those of {', '.join(TEXT_MODELS)}; for another model set modality_router_bias to false."
        )
    extend(text_model, ModalityTextModel)
    for layer in text_model.layers:
        extend(layer, ModalityLayer)
        if gate := getattr(layer.mlp, "gate", None):
            extend(gate, ModalityGate)
            # With a type of its own, it keeps it when the model is loaded in another.
            gate.modality_bias = nn.Parameter(torch.zeros(num_modalities, len(gate.weight), dtype=torch.float32))


class ModalityAwareProjector(InternVLMultiModalProjector):
    """InternVL's projector, with or without its LayerNorm, of scaled features."""

    def __init__(self, config: ModalityAwareInternVLConfig) -> None:
        super().__init__(config)
        self.scale = config.vision_feature_scale
        if not config.projector_layer_norm:
            self.layer_norm = nn.Identity()  # type: ignore[assignment]

    def forward(self, image_features: Tensor) -> Tensor:
        """[..., features] -> [..., hidden]; the pixel shuffle before it only moves features, so the scale commutes."""
        return super().forward(image_features * self.scale)


class ModalityAwareInternVLModel(InternVLModel):
    """Vision tower, projector, and a text model whose gates know the modality of each token."""

    config_class = ModalityAwareInternVLConfig

    def __init__(self, config: ModalityAwareInternVLConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = ModalityAwareProjector(config)
        if config.modality_router_bias:
            add_modality_biases(self.language_model, config.num_modalities)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As InternVL's, with `mm_token_type_ids` [b, s] (0 text, 1 vision), which only `inputs_embeds` need.

        Raises:
            ValueError: `inputs_embeds` came alone: embeddings do not show which of them are the vision encoder's.
        """
        if self.config.modality_router_bias:
            kwargs["modality_ids"] = self._modality_ids(input_ids, inputs_embeds, mm_token_type_ids)
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)

    def _modality_ids(self, input_ids: Tensor | None, embeds: Tensor | None, given: Tensor | None) -> Tensor:
        if input_ids is not None:
            return (input_ids == self.config.image_token_id).long()
        if embeds is None or given is None or given.shape != embeds.shape[:2]:
            raise ValueError(
                "This model routes by modality and needs input_ids, or with inputs_embeds [b, s, h] also "
                "mm_token_type_ids [b, s]: 0 for text, 1 where the vision encoder fills the position."
            )
        return given.long()


class ModalityAwareInternVLForConditionalGeneration(InternVLForConditionalGeneration):
    """The model with its language-modelling head; `generate()` and `save_pretrained()` are transformers' own."""

    config_class = ModalityAwareInternVLConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: ModalityAwareInternVLConfig) -> None:
        InternVLPreTrainedModel.__init__(self, config)  # InternVL's own would build its plain model first
        self.model = ModalityAwareInternVLModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Names the two, as `generate(inputs_embeds=..., mm_token_type_ids=...)` asks of a model that takes them."""
        kwargs |= {"inputs_embeds": inputs_embeds, "mm_token_type_ids": mm_token_type_ids}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


# Transformers renames weights between disk and memory by model type and class name: ours are InternVL's.
for ours, theirs in (("modality_aware_internvl", "internvl"), ("ModalityAwareInternVLModel", "InternVLModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
