# SPDX-License-Identifier: Apache-2.0
"""The recipes' models, in their published sizes and in a size small enough for a CPU."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import (
    CLIPVisionConfig,
    InternVLVisionConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

TINY_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TINY_LANGUAGE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Architecture:
    """A language model and a vision tower, as published.

    Attributes:
        language: Config of the language model.
        vision: Config of the vision tower.
        tiny_language: Fields of `language` with other values in the small model.
        tiny_vision: Fields of `vision` with other values in the small tower.
        upcycled: For a dense language model that is upcycled: number of experts, top-k, and n to upcycle every n-th
            layer.
        tokens_per_tile: Number of vision tokens per tile.
    """

    language: PretrainedConfig
    vision: PretrainedConfig
    tiny_language: dict[str, Any]
    tiny_vision: dict[str, Any]
    tokens_per_tile: int
    upcycled: tuple[int, int, int] | None = None

    def tiny(self, vocab_size: int) -> tuple[PretrainedConfig, PretrainedConfig]:
        """Returns the configs of the small language model, with its tokenizer's vocabulary, and of the small tower."""
        language, vision = copy.deepcopy(self.language), copy.deepcopy(self.vision)
        language.update(TINY_LANGUAGE | self.tiny_language | {"vocab_size": vocab_size})
        vision.update(TINY_TOWER | self.tiny_vision)
        return language, vision


# OpenGVLab/InternViT-300M-448px in transformers' format.
_INTERNVIT_300M = InternVLVisionConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=[448, 448]
)

ARCHITECTURES: dict[str, Architecture] = {
    "mixtral_8x7b_internvit": Architecture(
        language=MixtralConfig(rope_theta=1e6, max_position_embeddings=32768),  # mistralai/Mixtral-8x7B-v0.1
        vision=_INTERNVIT_300M,
        tiny_language={"intermediate_size": 128, "num_key_value_heads": 2},
        tiny_vision={"image_size": [56, 56]},
        tokens_per_tile=256,
    ),
    "qwen3_30b_a3b_internvl": Architecture(
        language=Qwen3MoeConfig(  # Qwen/Qwen3-30B-A3B
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            max_position_embeddings=40960,
            rope_theta=1e6,
            tie_word_embeddings=False,
        ),
        vision=_INTERNVIT_300M,
        # As in Qwen3, head size x heads differs from the hidden size, and more than two experts are chosen.
        tiny_language={
            "intermediate_size": 128,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        },
        tiny_vision={"image_size": [56, 56]},
        tokens_per_tile=256,
    ),
    "moe_llava_phi": Architecture(
        language=PhiConfig(  # microsoft/phi-2
            vocab_size=51200,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=2048,
            partial_rotary_factor=0.4,
        ),
        vision=CLIPVisionConfig(  # openai/clip-vit-large-patch14-336
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        # Four layers, so that experts and dense layers alternate.
        tiny_language={"intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 4},
        tiny_vision={"image_size": 56},
        tokens_per_tile=576,
        upcycled=(4, 2, 2),
    ),
}
