# SPDX-License-Identifier: Apache-2.0
"""InternVL extended to a modality-aware model; needs only torch and transformers (5.23 or newer).

A folder with this file next to its weights loads with `trust_remote_code=True`. Added to transformers' own classes:

- a gate per modality (Ming-Omni, arXiv 2506.09344; MoIIE, arXiv 2508.09779): g_m(x) = W_m x, W_m [E, h], of which W_0
  is the text model's own;
- a bias per modality on the logits of each MoE layer's gate, before the gate's own softmax or sigmoid and top-k
  (SMAR, equations 1 and 2): logits = g(x) + b[m], b [M, E] in float32, -1e9 for experts that m may not choose;
- a projector without LayerNorm, features scaled before the pixel shuffle, CLIP and SigLIP as vision towers.

The modality m is 1 where the vision encoder fills the position (`input_ids == image_token_id`), and 0 elsewhere: for
text, also while it is generated, and for padding.

Weights have the plain model's names on disk; bias and further gates are stored with the gate, as
`...gate.modality_bias` and `...gate.modality_weight_1`.
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

# Text models whose gate, `layers.N.mlp.gate`, computes its logits by one linear layer without a bias, with `weight`
# [E, hidden_dim], and returns (logits, weights, indices).
TEXT_MODELS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


class ModalityAwareInternVLConfig(InternVLConfig):
    """InternVL's configuration with additional fields.

    Attributes:
        num_modalities: Number of modalities, M, i.e. rows of each bias: text, vision, and further ones not used yet.
        modality_router_bias: Whether the gates have modality biases.
        modality_gates: Whether each modality has a gate of its own.
        projector_layer_norm: Whether the projector begins with a LayerNorm, as InternVL's does.
        vision_feature_scale: Multiplies the vision features before the pixel shuffle; VITA's checkpoints use 0.5.
        lm_head_bias: Whether the output layer has a bias, as Phi's has.
    """

    model_type = "modality_aware_internvl"
    _auto_class = "AutoConfig"  # so that save_pretrained copies this file
    sub_configs_defaults = {  # noqa: RUF012 - transformers reads the class attribute, where InternVL fixes its own tower
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="mixtral"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="internvl_vision"),
    }

    num_modalities: int = 2
    modality_router_bias: bool = True
    modality_gates: bool = False
    projector_layer_norm: bool = True
    vision_feature_scale: float = 1.0
    lm_head_bias: bool = False


class WithWeight:
    """Stands in for a gate as `self` of the gate's own `forward`, with another weight for its linear layer."""

    def __init__(self, gate: nn.Module, weight: Tensor) -> None:
        self.gate = gate
        self.weight = weight
        self.hidden_dim = weight.shape[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)


class ModalityGate(nn.Module):
    """Mixed in before a text model's gate class: the gate and the bias of each token's modality."""

    weight: nn.Parameter  # [E, hidden_dim], the gate's own: text's
    modality_bias: nn.Parameter | None  # [M, E] float32
    others: range  # modalities m with a gate of their own, `modality_weight_<m>` [E, hidden_dim]
    modality_ids: Tensor | None = None  # [b, s], for the current forward pass
    own_forward: Callable[..., Any]  # the gate class's forward, unbound

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits [b * s, E], and weights and indices of the chosen experts, both [b * s, top_k]."""
        if self.modality_ids is None:
            raise ValueError(
                "The gate was called outside of its decoder layer, which passes it the tokens' modalities."
            )
        logits, _, _ = self.own_forward(self, hidden_states)
        modalities = self.modality_ids.reshape(-1).to(logits.device)
        for modality in self.others:
            weight = getattr(self, f"modality_weight_{modality}")
            own, _, _ = self.own_forward(WithWeight(self, weight), hidden_states)
            logits = torch.where((modalities == modality).unsqueeze(-1), own, logits)
        if self.modality_bias is not None:
            # As in the trainer, the sum is in float32 even if the linear layer is in bfloat16.
            logits = logits + self.modality_bias[modalities]
        # With the identity as its weight, the gate's linear layer returns the logits unchanged.
        identity = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        return self.own_forward(WithWeight(self, identity), logits)


class ModalityLayer(nn.Module):
    """Mixed in before a text model's decoder layer class: passes the modality ids to the gate.

    They are an argument of the layer and not an attribute of the model, so that a recomputed layer gets the ids of its
    own batch.
    """

    def forward(self, *args: Any, modality_ids: Tensor, **kwargs: Any) -> Any:
        """Runs the decoder layer, after passing `modality_ids` [b, s] to its gate."""
        if gate := getattr(self.mlp, "gate", None):  # some layers of a text model may be dense
            gate.modality_ids = modality_ids
        return super().forward(*args, **kwargs)


class ModalityTextModel(nn.Module):
    """Mixed in before a text model's class: initializes what a checkpoint lacks, biases to zero, gates to text's."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, ModalityGate):
            if module.modality_bias is not None:
                init.zeros_(module.modality_bias)
            for modality in module.others:
                init.copy_(getattr(module, f"modality_weight_{modality}"), module.weight)


def extend(module: nn.Module, extension: type[nn.Module]) -> None:
    """Mixes a class in before a module's own; the class name stays, since transformers looks classes up by name."""
    own = type(module)
    attributes = {"__module__": own.__module__, "own_forward": staticmethod(own.forward)}
    module.__class__ = type(own.__name__, (extension, own), attributes)


def extend_gates(text_model: Any, config: ModalityAwareInternVLConfig) -> None:
    """Adds to each gate of a text model what the config says: a modality bias [M, E], a gate [E, h] per modality.

    Raises:
        ValueError: The gates of this text model are not supported.
    """
    if text_model.config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"modality_router_bias or modality_gates is true, and the text model is {text_model.config.model_type!r}; "
            f"the gates known here are those of {', '.join(TEXT_MODELS)}; for another model set both to false."
        )
    extend(text_model, ModalityTextModel)
    for layer in text_model.layers:
        extend(layer, ModalityLayer)
        if gate := getattr(layer.mlp, "gate", None):
            extend(gate, ModalityGate)
            shape = (config.num_modalities, len(gate.weight))
            # An explicit dtype keeps the bias in float32 when the model is loaded in another data type.
            bias = nn.Parameter(torch.zeros(shape, dtype=torch.float32)) if config.modality_router_bias else None
            gate.register_parameter("modality_bias", bias)
            gate.others = range(1, config.num_modalities if config.modality_gates else 1)
            for modality in gate.others:
                gate.register_parameter(f"modality_weight_{modality}", nn.Parameter(torch.empty_like(gate.weight)))


class ModalityAwareProjector(InternVLMultiModalProjector):
    """InternVL's projector on scaled features, with or without its LayerNorm."""

    def __init__(self, config: ModalityAwareInternVLConfig) -> None:
        super().__init__(config)
        self.scale = config.vision_feature_scale
        if not config.projector_layer_norm:
            self.layer_norm = nn.Identity()  # type: ignore[assignment]

    def forward(self, image_features: Tensor) -> Tensor:
        """Projects [..., features] to [..., hidden].

        Scaling here equals scaling before the pixel shuffle, which only moves features.
        """
        return super().forward(image_features * self.scale)


class ModalityAwareInternVLModel(InternVLModel):
    """Vision tower, projector, and a text model whose gates get the modality of each token."""

    config_class = ModalityAwareInternVLConfig

    def __init__(self, config: ModalityAwareInternVLConfig) -> None:
        super().__init__(config)
        self.multi_modal_projector = ModalityAwareProjector(config)
        if config.modality_router_bias or config.modality_gates:
            extend_gates(self.language_model, config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs InternVL's forward pass, with the tokens' modalities for the gates.

        `mm_token_type_ids` [b, s] (0 text, 1 vision) are needed with `inputs_embeds` only.

        Raises:
            ValueError: `inputs_embeds` came without them: embeddings do not show which are the vision encoder's.
        """
        if self.config.modality_router_bias or self.config.modality_gates:
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
    """The model with its language modeling head; `generate()` and `save_pretrained()` are transformers' own."""

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
        """Names both arguments: `generate(inputs_embeds=..., mm_token_type_ids=...)` accepts only named ones."""
        kwargs |= {"inputs_embeds": inputs_embeds, "mm_token_type_ids": mm_token_type_ids}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


# transformers renames weights between disk and memory by model type and class name. Use InternVL's renaming here.
for name, plain in (("modality_aware_internvl", "internvl"), ("ModalityAwareInternVLModel", "InternVLModel")):
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(plain), overwrite=True)
