# SPDX-License-Identifier: Apache-2.0
"""Small random models of every language architecture that can be converted, in several variants.

Vocabulary sizes are odd, so that no tensor-parallel size divides them. Norms differ from one and biases from zero, so
that a missing or misplaced parameter is noticed.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, LENGTH = 131, 24

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MOE = {"num_experts_per_tok": 2, "num_experts": 4}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Name -> model type, and changes to `SHAPE`. The first case of each type also runs in every parallel layout.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, tied, one group per head": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe, first layer dense": (
        "qwen3_moe",
        MOE | {"head_dim": 16, "moe_intermediate_size": 20, "norm_topk_prob": True, "mlp_only_layers": [0]},
    ),
    "qwen3_moe, every second layer dense, tied": (
        "qwen3_moe",
        MOE
        | {"head_dim": 6, "moe_intermediate_size": 20, "norm_topk_prob": False, "decoder_sparse_step": 2}
        | {"num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    "olmoe": ("olmoe", MOE | {"norm_topk_prob": False, "num_key_value_heads": 4}),
    "olmoe, grouped queries, renormalized": ("olmoe", MOE | {"norm_topk_prob": True}),
    "deepseek_v2, Lite": (
        "deepseek_v2",
        LATENT
        | {
            "q_lora_rank": None,
            "num_experts_per_tok": 3,
            "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v2, latent queries, groups": (
        "deepseek_v2",
        LATENT
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
        | {"routed_scaling_factor": 2.0, "num_hidden_layers": 4},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "rope_parameters": YARN},
    ),
    "deepseek_v3, Moonlight": (
        "deepseek_v3",
        LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "rms_norm_eps": 1e-2}
        | {"routed_scaling_factor": 2.446},
    ),
    "llama, version 3": ("llama", {"rope_parameters": LLAMA_3}),
    "llama, scaled linearly, tied": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "tie_word_embeddings": True}
        | {"num_key_value_heads": 4},
    ),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 48}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, one group per head": ("qwen2", {"num_key_value_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, "pad_token_id": 0}),
    "phi3, one group per head": ("phi3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": 0}),
    "phi": (
        "phi",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi, grouped queries": ("phi", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}),
}
FIRST = {kind: name for name, (kind, _) in reversed(CASES.items())}


def build_config(name: str, **changes: Any) -> Any:
    """Returns the config of one of `CASES`."""
    from transformers import AutoConfig

    kind, settings = CASES[name]
    return AutoConfig.for_model(kind, **(SHAPE | settings | changes))


def build_hf(name: str) -> Any:
    """Builds a random model of one of `CASES`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(name)).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("inv_freq"):
                continue
            mean, deviation = (0.0, 0.3) if "bias" in key else (1.0, 0.2) if tensor.dim() == 1 else (0.0, 0.15)
            tensor.normal_(mean, deviation)
    return model


def composite_source(hf: Any, tower: Path, folder: Path, image_token: int = VOCABULARY - 1) -> Any:
    """Returns the source of an import: a language model, a vision tower and a newly initialized connector.

    Args:
        hf: The language model; its vocabulary already has the image tokens.
        tower: Folder of the vision tower.
        folder: Folder to save the language model to.
        image_token: Id of the placeholder for one vision token.
    """
    from megatron_smar.checkpoint.safetensors_io import read_folder
    from megatron_smar.conversion import composite
    from megatron_smar.conversion.sources import Source

    hf.save_pretrained(folder)
    vision = composite.load_config(tower)
    config = composite.combine(hf.config, vision, composite.Connection(), image_token, hf.config.vocab_size)
    parts = ((folder, composite.LANGUAGE), (tower, composite.VISION))
    tensors = {part + name: tensor for place, part in parts for name, tensor in read_folder(place).items()}
    table = composite.weights(config, biases=False, connector_seed=0)
    return Source(config, tensors, table, composite.flags(config), ())


def sample_ids() -> Tensor:
    """Returns random token ids [2, s]."""
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
