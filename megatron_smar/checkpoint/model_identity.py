# SPDX-License-Identifier: Apache-2.0
"""Checks that a run's flags describe the model in its checkpoint, where no weight's shape would show a difference."""

from __future__ import annotations

import functools
import json
import re
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from megatron.training.arguments import add_megatron_arguments
from transformers import PretrainedConfig

from megatron_smar.checkpoint.fit import CheckpointMismatchError, checkpoint_to_load
from megatron_smar.checkpoint.metadata import read_common_state, read_contents, saved_arguments
from megatron_smar.checkpoint.tokenizer_identity import settle_vocabulary
from megatron_smar.config.build import vision_config
from megatron_smar.config.flags import add_arguments
from megatron_smar.model.vision import load_vision_config

# Arguments that decide what the model computes, grouped by subject. Not among them: arguments that only say how it is
# computed (kernels, precision, layout), how it is trained (dropout, losses, capacity, frozen parts) or what it is fed
# (tiles, templates).
FUNCTION = """
    num_layers hidden_size ffn_hidden_size spec mtp_num_layers use_mup mup_width_mult mup_base_hidden_size
    mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power

    num_attention_heads num_query_groups kv_channels softmax_type window_size window_attn_skip_freq
    attention_output_gate experimental_attention_variant linear_attention_freq multi_latent_attention q_lora_rank
    kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim

    position_embedding_type rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor
    use_rope_scaling rope_scaling_factor no_rope_freq mrope_section rope_type rotary_scaling_factor mscale
    mscale_all_dim yarn_original_max_position_embeddings

    normalization layernorm_epsilon layernorm_zero_centered_gamma qk_layernorm
    qk_l2_norm qk_norm_scope latent_norm_epsilon apply_residual_connection_post_layernorm parallel_block

    swiglu openai_gelu squared_relu quick_geglu gelu_tanh activation_func_clamp_value glu_linear_offset
    add_bias_linear add_qkv_bias output_bias untie_embeddings_and_output_weights

    num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_score_function moe_router_pre_softmax
    moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias
    moe_apply_probs_on_input moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size

    image_modalities image_size connector pixel_shuffle vision_feature_layer vision_feature_scale
""".split()
TOWER = "vision_tower"
# Fields of a vision tower's config that do not change what it computes.
_IGNORED_TOWER_FIELDS = re.compile(
    r"_.*|.*dtype|transformers_version|architectures|.*dropout.*|initializer.*|output_.*|"
    r"id2label|label2id|problem_type|return_dict|chunk_size_feed_forward|projection_dim|"
    r"use_cache|is_encoder_decoder|auto_map|.*_token_id"
)


def check_identity(args: Namespace, tokenizer: Any) -> None:
    """Compares a run's model and tokenizer with those of the checkpoint that it loads, and records them in `args`.

    All ranks read the same files, so all reach the same result.

    Args:
        args: The run's validated arguments; `true_vocab_size`, `padded_vocab_size`, `tokenizer_fingerprints` and
            `vision_tower` are set, and are saved with every checkpoint.
        tokenizer: Megatron's tokenizer.

    Raises:
        ValueError: They differ; the message names the flag, the stored and the given value.
    """
    folder = checkpoint_to_load(args)
    saved = None if folder is None else saved_arguments(read_common_state(folder, read_contents(folder)))
    args.vision_tower = describe_tower(args)
    settle_vocabulary(args, tokenizer, saved)
    if saved is not None:
        check_function(args, saved)


def describe_tower(args: Namespace) -> str:
    """Returns the fields of the vision tower's config that decide what it computes, as text to compare two towers."""
    fields = _fields(load_vision_config(vision_config(args)))
    return json.dumps(fields, sort_keys=True, default=str)


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not _IGNORED_TOWER_FIELDS.fullmatch(name)}


def check_function(args: Namespace, saved: Any) -> None:
    """Compares the arguments that decide what the model computes.

    Args:
        args: The run's arguments.
        saved: The arguments of the run, or of the import, that saved the checkpoint; arguments missing there pass.

    Raises:
        CheckpointMismatchError: An argument differs that --allow-model-change does not name.
    """
    allowed = set(args.allow_model_change)
    unknown = sorted(allowed - {"tokenizer", "vision-model"} - set(_names().values()) - OPTIONAL)
    if unknown:
        raise ValueError(
            f"--allow-model-change {unknown[0]} names no flag of the model; give some of: tokenizer vision-model "
            f"{' '.join(sorted(set(_names().values())))}."
        )
    changed = [sentence for flag, sentence in _differences(args, saved) if flag not in allowed]
    if changed:
        raise CheckpointMismatchError(
            f"--load {args.load or args.pretrained_checkpoint} holds another model than the flags describe: "
            f"{'; '.join(changed)}. Give the flags that it was saved or imported with (an import has them in "
            "flags.txt), or name those that are meant to change: --allow-model-change FLAG ..."
        )


# Values of --allow-model-change besides the flags of `FUNCTION`: parts whose weights may be left unloaded on purpose.
OPTIONAL = {"no-modality-router-bias"}


def _differences(args: Namespace, saved: Any) -> Iterator[tuple[str, str]]:
    """Yields, for each flag that differs, its name and a text with the stored and the given value."""
    given, stored = vars(args), vars(saved)
    for dest in FUNCTION:
        if dest in stored and dest in given:
            was, now = _value(dest, stored), _value(dest, given)
            if was != now:
                flag = _names()[dest]
                yield flag, f"--{flag} {_shown(dest, was)} there and {_shown(dest, now)} here"
    was, now = (json.loads(values.get(TOWER) or "{}") for values in (stored, given))
    fields = sorted(name for name in set(was) & set(now) if was[name] != now[name])
    if fields:
        shown = ", ".join(f"{name} was {was[name]} there and is {now[name]} here" for name in fields)
        yield "vision-model", f"the encoder of --vision-model {args.vision_model} is another one ({shown})"


def _value(dest: str, values: dict[str, Any]) -> Any:
    """Returns an argument's value in a normal form, so that equal settings compare equal."""
    value = values[dest]
    if dest == "num_query_groups":
        grouped = values.get("group_query_attention")
        return value if grouped and value else values.get("num_attention_heads")
    if dest == "moe_layer_freq":
        if not values.get("num_experts"):
            return None
        layers = range(values.get("num_layers") or 0)
        return [int(layer % value == 0) for layer in layers] if isinstance(value, int) else list(map(int, value))
    if dest == "spec" or isinstance(value, tuple):
        return list(value) if value else None
    if dest.startswith("moe_") and not values.get("num_experts"):
        return None
    if dest in _LATENT_ATTENTION_ARGUMENTS and not values.get("multi_latent_attention"):
        return None
    return value or None


_LATENT_ATTENTION_ARGUMENTS = {
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
    "rotary_scaling_factor", "mscale", "mscale_all_dim",
}  # fmt: skip


def _shown(dest: str, value: Any) -> str:
    action = _actions()[dest]
    if action.nargs == 0:
        return "was given" if (value or False) == action.const else "was not given"
    return f"is {'not given' if value is None else value}"


@functools.cache
def _actions() -> dict[str, Action]:
    """Returns the parser's actions for the flags of `FUNCTION`, by argument name."""
    parser = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    found: dict[str, Action] = {}
    for action in parser._actions:
        if action.dest in FUNCTION and action.option_strings:
            found.setdefault(action.dest, action)
    return found


@functools.cache
def _names() -> dict[str, str]:
    """Returns flag names without dashes, by argument name; derived arguments without a flag get their own name."""
    named = {dest: action.option_strings[0].removeprefix("--") for dest, action in _actions().items()}
    return {dest: named.get(dest, dest.replace("_", "-")) for dest in FUNCTION}
