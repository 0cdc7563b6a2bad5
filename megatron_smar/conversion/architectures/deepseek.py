# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V2(-Lite), DeepSeek-V3 and Moonlight: multi-latent attention, shared experts, dense layers first."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_smar.conversion.architectures.common import (
    HF_LAYER,
    MEGATRON_LAYER,
    Flags,
    UnsupportedError,
    decoder_flags,
    dense_weights,
    expert_weights,
    layers_of,
    moe_flags,
    norm_weights,
    outer_weights,
    refuse,
    require,
    rope_field,
    rope_theta,
)
from megatron_smar.conversion.weights import Weight, per_layer

LATENT_NORM_EPSILON = 1e-6  # transformers' epsilon for these norms, whatever rms_norm_eps is


def moe_layers(config: PretrainedConfig) -> list[int]:
    """Returns the numbers of the MoE layers, from 0."""
    return [layer for layer in layers_of(config) if layer >= config.first_k_dense_replace]


def flags(config: PretrainedConfig) -> Flags:
    """Returns the trainer's flags for a config."""
    refuse(config, num_key_value_heads=config.num_attention_heads, rope_interleave=True, moe_layer_freq=1)
    decoder = decoder_flags(config, rope=rope_flags(config)) | latent_flags(config)
    moe = moe_layers(config)
    if not moe:
        return decoder
    routing = sigmoid_routing(config) if config.model_type == "deepseek_v3" else softmax_routing(config)
    return {
        **decoder,
        **moe_flags(config, config.n_routed_experts, config.moe_intermediate_size, False, moe),
        "moe-shared-expert-intermediate-size": config.n_shared_experts * config.moe_intermediate_size,
        "moe-router-dtype": "fp32",
        "moe-router-topk-scaling-factor": config.routed_scaling_factor,
        **routing,
    }


def latent_flags(config: PretrainedConfig) -> Flags:
    """Returns the flags of multi-latent attention."""
    return {
        "multi-latent-attention": True,
        "kv-channels": None,
        "num-query-groups": None,
        "q-lora-rank": config.q_lora_rank,
        "kv-lora-rank": config.kv_lora_rank,
        "qk-head-dim": config.qk_nope_head_dim,
        "qk-pos-emb-head-dim": config.qk_rope_head_dim,
        "v-head-dim": config.v_head_dim,
        "qk-layernorm": True,
        "latent-norm-epsilon": LATENT_NORM_EPSILON,
    }


def rope_flags(config: PretrainedConfig) -> Flags:
    """Returns the flags of multi-latent attention's rotary embedding: unscaled, or YaRN as DeepSeek published it."""
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    require(config, "rope_type in rope_parameters", kind, ("default", "yarn"))
    require(config, "partial_rotary_factor in rope_parameters", rope.get("partial_rotary_factor", 1.0), (1.0,))
    if kind == "default":
        # Megatron's fused kernel for multi-latent attention supports YaRN only.
        return {"rotary-base": rope_theta(config), "rope-type": "rope", "no-rope-fusion": True}
    # Megatron has no flags for these.
    original = rope_field(config, "original_max_position_embeddings")
    require(config, "original_max_position_embeddings in rope_parameters", original, (4096,))
    for field, value in {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}.items():
        given = rope.get(field)
        require(config, f"{field} in rope_parameters", value if given is None else given, (value,))
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if all_dim and not mscale:
        raise UnsupportedError(
            f"mscale is {mscale!r} with mscale_all_dim {all_dim!r} in rope_parameters of this {config.model_type} "
            "model; only both, or no mscale_all_dim, can be trained here."
        )
    return {
        "rotary-base": rope_theta(config),
        "rope-type": "yarn",
        "rotary-scaling-factor": rope_field(config, "factor"),
        "mscale": mscale if all_dim else 1.0,  # transformers uses both fields or neither
        "mscale-all-dim": all_dim or 0.0,
    }


def softmax_routing(config: PretrainedConfig) -> Flags:
    """Returns the flags of DeepSeek-V2's routing: softmax over all experts, never renormalized.

    Groups are chosen by their best expert.
    """
    refuse(config, scoring_func="softmax", norm_topk_prob=False, topk_method=("greedy", "group_limited_greedy"))
    grouped = config.topk_method == "group_limited_greedy"
    if grouped and config.num_experts_per_tok // config.topk_group != 1:
        # Megatron chooses groups by the sum of their best num_experts_per_tok // topk_group experts.
        raise UnsupportedError(
            f"topk_method is 'group_limited_greedy' with num_experts_per_tok {config.num_experts_per_tok} and "
            f"topk_group {config.topk_group} in the config of this deepseek_v2 model; groups that are chosen by their "
            "one best expert can only be trained here where num_experts_per_tok < 2 * topk_group."
        )
    return {"moe-router-pre-softmax": True, **(group_flags(config) if grouped else {})}


def sigmoid_routing(config: PretrainedConfig) -> Flags:
    """Returns the flags of DeepSeek-V3's routing: sigmoid scores, experts chosen with a bias, weights renormalized.

    Groups are chosen by their two best experts.
    """
    refuse(config, scoring_func="sigmoid", norm_topk_prob=True, topk_method="noaux_tc")
    if config.num_experts_per_tok == 1:
        raise UnsupportedError(
            "num_experts_per_tok is 1 in the config of this deepseek_v3 model; with norm_topk_prob only 2 or more can "
            "be trained here."
        )
    grouped = config.n_group > 1
    if grouped and config.num_experts_per_tok // config.topk_group != 2:
        raise UnsupportedError(
            f"num_experts_per_tok is {config.num_experts_per_tok} and topk_group {config.topk_group} in the config of "
            "this deepseek_v3 model; groups that are chosen by their two best experts can only be trained here where "
            "num_experts_per_tok // topk_group is 2."
        )
    return {
        "moe-router-score-function": "sigmoid",
        "moe-router-enable-expert-bias": True,
        **(group_flags(config) if grouped else {}),
    }


def group_flags(config: PretrainedConfig) -> Flags:
    """Returns the flags of group-limited routing."""
    return {"moe-router-num-groups": config.n_group, "moe-router-group-topk": config.topk_group}


def weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the weight table for a config."""
    moe, experts_ffn = moe_layers(config), config.moe_intermediate_size
    dense = [layer for layer in layers_of(config) if layer not in moe]
    router, gate = MEGATRON_LAYER + "mlp.router.", HF_LAYER + "mlp.gate."
    bias = per_layer(moe, router + "expert_bias", gate + "e_score_correction_bias")
    return [
        *outer_weights(config),
        *norm_weights(config),
        *latent_weights(config),
        *dense_weights(dense, config.intermediate_size),
        *expert_weights(moe, config.n_routed_experts, experts_ffn),
        *dense_weights(moe, config.n_shared_experts * experts_ffn, "mlp.shared_experts", "mlp.shared_experts"),
        *(bias if config.model_type == "deepseek_v3" else []),
    ]


def latent_weights(config: PretrainedConfig) -> list[Weight]:
    """Returns the table of multi-latent attention: weights match one to one, with heads in the same order."""
    names = {
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    queries = {"linear_q_down_proj": "q_a_proj", "q_layernorm": "q_a_layernorm", "linear_q_up_proj": "q_b_proj"}
    names |= {"linear_q_proj": "q_proj"} if config.q_lora_rank is None else queries
    layers, megatron, hf = layers_of(config), MEGATRON_LAYER + "self_attention.", HF_LAYER + "self_attn."
    return [
        row
        for name, hf_name in names.items()
        for row in per_layer(layers, f"{megatron}{name}.weight", f"{hf}{hf_name}.weight")
    ]
