# SPDX-License-Identifier: Apache-2.0
"""Small exports with modeling code, and the trainer's model of the same weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    DeepseekV2Config,
    DeepseekV3Config,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from megatron_smar.huggingface import (
    RemoteFields,
    write_remote_code,
)
from tests.models import build_hf_model, build_model, copy_weights, prepare

IMAGE, SIDE, TOKENS_PER_TILE, EXPERTS = 5, 32, 4, 4
BIASED = RemoteFields(modality_router_bias=True)
GATED = RemoteFields(modality_router_bias=True, modality_gates=True)

VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT = dict(
    vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None
)
GROUPED = dict(TEXT, num_key_value_heads=2)
EXPERT_SIZES = dict(moe_intermediate_size=32, num_experts_per_tok=2)
LATENT = dict(
    EXPERT_SIZES, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=EXPERTS, first_k_dense_replace=1,
    kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip
FIELDS = ["biases", "gates and biases", "gates"]
# Each text model, with the arguments of Megatron's top-k routing for it (its --moe-router-* flags).
GATES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "mixtral": (MixtralConfig(**GROUPED, num_local_experts=EXPERTS, num_experts_per_tok=2), {}),
    "qwen3_moe": (
        Qwen3MoeConfig(
            **GROUPED, **EXPERT_SIZES, head_dim=16, num_experts=EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]
        ),
        {},
    ),
    "olmoe": (OlmoeConfig(**GROUPED, num_experts=EXPERTS, num_experts_per_tok=2), {"use_pre_softmax": True}),
    "deepseek_v2": (
        DeepseekV2Config(**TEXT, **LATENT, routed_scaling_factor=1.5),
        {"use_pre_softmax": True, "scaling_factor": 1.5},
    ),
    "deepseek_v3": (
        DeepseekV3Config(**TEXT, **LATENT, n_group=2, topk_group=1, routed_scaling_factor=2.5),
        {"score_function": "sigmoid", "num_groups": 2, "group_topk": 1, "scaling_factor": 2.5},
    ),
}


def composite(text: PretrainedConfig, **changes: Any) -> InternVLForConditionalGeneration:
    vision = InternVLVisionConfig(**VISION, image_size=SIDE, patch_size=8)
    settings = dict(vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False)
    torch.manual_seed(0)
    return InternVLForConditionalGeneration(InternVLConfig(**(settings | changes))).eval()


def export(
    plain: InternVLForConditionalGeneration, folder: Path, fields: RemoteFields, **config: Any
) -> dict[str, Tensor]:
    """Saves a plain model with modeling code, random biases and gates, and returns the tensors on disk."""
    plain.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(write_remote_code(folder, written, fields)))
    tensors = load_file(folder / "model.safetensors")
    if fields.modality_router_bias:
        generator = torch.Generator().manual_seed(7)
        for gate in sorted(name for name in tensors if name.endswith(".gate.weight")):
            bias = torch.randn(fields.num_modalities, EXPERTS, generator=generator)
            tensors[gate.removesuffix("weight") + "modality_bias"] = bias
    if fields.modality_gates:
        generator = torch.Generator().manual_seed(8)
        for gate in sorted(name for name in tensors if name.endswith(".gate.weight")):
            weight = torch.randn(tensors[gate].shape, generator=generator) / 4
            tensors[gate.removesuffix("weight") + "modality_weight_1"] = weight
    if not fields.projector_layer_norm:
        tensors = {name: tensor for name, tensor in tensors.items() if "projector.layer_norm" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load(folder: Path, **settings: Any) -> Any:
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **settings
    )
    assert not any(report.values()), report
    return model.eval()


def samples() -> tuple[Tensor, Tensor]:
    """Returns three samples: two images, one image at the end, and text only."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 128, (3, 20), generator=generator)
    ids[0, :TOKENS_PER_TILE] = ids[0, 9 : 9 + TOKENS_PER_TILE] = ids[1, -TOKENS_PER_TILE:] = IMAGE
    return ids, torch.randn(3, 3, SIDE, SIDE, generator=generator)


class Trainer:
    """The trainer's model with the weights of an export of `build_hf_model`, whose text model is Mixtral.

    The export has random biases and, with MoIIE, random gates; its biases then say which experts a modality may not
    choose.
    """

    def __init__(self, folder: Path, strategy: str = "smar") -> None:
        plain = build_hf_model(image_token_id=IMAGE)
        plain.generation_config.eos_token_id = None
        self.tensors = export(plain, folder / "export", GATED if strategy == "moiie" else BIASED)
        plain.model.vision_tower.save_pretrained(folder / "tower")
        routing = {"strategy": strategy}
        self.model = build_model(str(folder / "tower"), connector="internvl", routing=routing).eval()
        copy_weights(plain, self.model)
        for index, layer in enumerate(self.model.language_model.decoder.layers):
            router, gate = layer.mlp.router, f"language_model.model.layers.{index}.block_sparse_moe.gate."
            router.modality_bias.bias.data.copy_(self.tensors[gate + "modality_bias"])
            if strategy == "moiie":
                router.strategy.gates["1"].weight.data.copy_(self.tensors[gate + "modality_weight_1"])
                self.tensors[gate + "modality_bias"].masked_fill_(~router.allowed, -1e9)
        save_file(self.tensors, folder / "export" / "model.safetensors", metadata={"format": "pt"})
        self.plain, self.folder = plain, folder / "export"

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(**prepare(ids, torch.zeros_like(ids, dtype=torch.bool), pixels, IMAGE))

    def continuation(self, ids: Tensor, pixels: Tensor, steps: int) -> Tensor:
        """Returns the greedy continuation [b, steps], each token computed from the full text so far."""
        for _ in range(steps):
            ids = torch.cat([ids, self.logits(ids, pixels)[:, -1:].argmax(-1)], dim=1)
        return ids[:, -steps:]
