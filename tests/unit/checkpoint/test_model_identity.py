# SPDX-License-Identifier: Apache-2.0
"""Flags that do not show in any weight's shape are compared with those that a checkpoint was saved with."""

import json
from argparse import Namespace

import pytest

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.model_identity import FUNCTION, _names, check_function, check_identity
from megatron_smar.checkpoint.torch_dist import CheckpointReader


@pytest.fixture(scope="module")
def stored(imported) -> Namespace:
    """Returns what an import stores, with the switches set without which other arguments have no effect."""
    args = CheckpointReader(imported).common_state["args"]
    return Namespace(**vars(args) | {"multi_latent_attention": True, "group_query_attention": True})


def given(stored: Namespace, **changes: object) -> Namespace:
    more = {"allow_model_change": [], "load": "checkpoints/start", "pretrained_checkpoint": None}
    return Namespace(**vars(stored) | more | changes)


def another(value: object) -> object:
    """Returns another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 3
        case list() | tuple():
            return [*value, 1]
        case str():
            return value + "_other"
        case _:
            return [3]


def test_the_same_flags_are_accepted(stored):
    check_function(given(stored), stored)


@pytest.mark.parametrize("dest", FUNCTION)
def test_each_argument_that_changes_what_the_model_computes_is_named_with_both_values(stored, dest):
    if not hasattr(stored, dest):
        pytest.fail(f"the import does not store {dest}, so it cannot be compared")
    changed = given(stored, **{dest: another(getattr(stored, dest))})
    with pytest.raises(CheckpointMismatchError, match=f"--{_names()[dest]} .* there and .* here") as refusal:
        check_function(changed, stored)
    assert "checkpoints/start" in str(refusal.value)
    changed.allow_model_change = [
        flag for flag in set(_names().values()) if f"--{flag} " in str(refusal.value).split("Give the flags")[0]
    ]
    check_function(changed, stored)


def test_switches_are_shown_as_given_or_not_given(stored):
    with pytest.raises(CheckpointMismatchError, match="--qk-layernorm was given there and was not given here"):
        check_function(given(stored, qk_layernorm=False), Namespace(**vars(stored) | {"qk_layernorm": True}))
    with pytest.raises(CheckpointMismatchError, match="--rotary-base is 10000 there and is 500000 here"):
        check_function(given(stored, rotary_base=500000), Namespace(**vars(stored) | {"rotary_base": 10000}))


def test_moe_layers_may_be_given_as_a_number_or_a_list(stored):
    every_other = Namespace(**vars(stored) | {"num_layers": 4, "moe_layer_freq": 2})
    check_function(given(every_other, moe_layer_freq=[1, 0, 1, 0]), every_other)
    with pytest.raises(CheckpointMismatchError, match="--moe-layer-freq"):
        check_function(given(every_other, moe_layer_freq=[1, 1, 1, 0]), every_other)


def test_expert_flags_are_not_compared_for_a_model_without_experts(stored):
    dense = Namespace(**vars(stored) | {"num_experts": None})
    check_function(given(dense, moe_router_topk=7), dense)


def test_a_vision_encoder_of_the_same_shapes_that_computes_something_else_is_refused(stored):
    tower = json.loads(stored.vision_tower)
    assert "layer_norm_eps" in tower and "num_attention_heads" in tower, "fields that shapes do not show"
    other = json.dumps(tower | {"layer_norm_eps": 0.5})
    with pytest.raises(CheckpointMismatchError, match=r"--vision-model .*layer_norm_eps was .* there and is 0.5 here"):
        check_function(given(stored, vision_tower=other), stored)
    check_function(given(stored, vision_tower=other, allow_model_change=["vision-model"]), stored)


def test_a_checkpoint_that_stores_fewer_arguments_is_accepted(stored):
    check_function(given(stored), Namespace())


def test_a_misspelled_name_in_allow_model_change_is_refused(stored):
    with pytest.raises(ValueError, match="--allow-model-change rotary_base names no flag of the model"):
        check_function(given(stored, allow_model_change=["rotary_base"]), stored)


def test_a_trained_checkpoint_is_compared_with_the_run_that_loads_it(trained, single_rank):
    """Uses the arguments that the trainer stored, as `setup.parse_arguments` does."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    saved = CheckpointReader(trained["plain"]).common_state["args"]
    args = given(saved, load=str(trained["plain"]), ckpt_step=None)
    check_identity(args, NullTokenizer(saved.vocab_size))
    assert args.true_vocab_size == saved.vocab_size and args.padded_vocab_size % args.make_vocab_size_divisible_by == 0
    with pytest.raises(CheckpointMismatchError, match="--moe-router-topk is 2 there and is 1 here"):
        check_identity(given(args, moe_router_topk=1, load=args.load), NullTokenizer(saved.vocab_size))
