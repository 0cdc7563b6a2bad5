# SPDX-License-Identifier: Apache-2.0
"""Flags that no weight's shape shows are compared with those that a checkpoint was saved or imported with."""

import json
from argparse import Namespace

import pytest

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.model_identity import FUNCTION, _names, check_function, check_identity
from megatron_smar.checkpoint.torch_dist import CheckpointReader


@pytest.fixture(scope="module")
def stored(imported) -> Namespace:
    """What an import stores; with everything that makes other arguments count."""
    args = CheckpointReader(imported).common_state["args"]
    return Namespace(**vars(args) | {"multi_latent_attention": True, "group_query_attention": True})


def given(stored: Namespace, **changes: object) -> Namespace:
    more = {"allow_model_change": [], "load": "checkpoints/start", "pretrained_checkpoint": None}
    return Namespace(**vars(stored) | more | changes)


def another(value: object) -> object:
    """Some other value of the same kind."""
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


def test_the_same_flags_pass(stored):
    check_function(given(stored), stored)


@pytest.mark.parametrize("dest", FUNCTION)
def test_each_argument_of_the_function_is_compared_and_named_with_both_values(stored, dest):
    if not hasattr(stored, dest):
        pytest.fail(f"the import does not store {dest}, so that it cannot be compared")
    changed = given(stored, **{dest: another(getattr(stored, dest))})
    with pytest.raises(CheckpointMismatchError, match=f"--{_names()[dest]} .* there and .* here") as refusal:
        check_function(changed, stored)
    assert "checkpoints/start" in str(refusal.value)
    changed.allow_model_change = [
        flag for flag in set(_names().values()) if f"--{flag} " in str(refusal.value).split("Give the flags")[0]
    ]
    check_function(changed, stored)


def test_what_was_given_and_what_was_not_is_said_in_words(stored):
    with pytest.raises(CheckpointMismatchError, match="--qk-layernorm was given there and was not given here"):
        check_function(given(stored, qk_layernorm=False), Namespace(**vars(stored) | {"qk_layernorm": True}))
    with pytest.raises(CheckpointMismatchError, match="--rotary-base is 10000 there and is 500000 here"):
        check_function(given(stored, rotary_base=500000), Namespace(**vars(stored) | {"rotary_base": 10000}))


def test_layers_with_experts_may_be_written_as_a_number_or_a_list(stored):
    every_other = Namespace(**vars(stored) | {"num_layers": 4, "moe_layer_freq": 2})
    check_function(given(every_other, moe_layer_freq=[1, 0, 1, 0]), every_other)
    with pytest.raises(CheckpointMismatchError, match="--moe-layer-freq"):
        check_function(given(every_other, moe_layer_freq=[1, 1, 1, 0]), every_other)


def test_experts_flags_of_a_model_without_experts_are_no_difference(stored):
    dense = Namespace(**vars(stored) | {"num_experts": None})
    check_function(given(dense, moe_router_topk=7), dense)


def test_a_vision_encoder_of_the_same_shapes_that_computes_something_else_is_refused(stored):
    tower = json.loads(stored.vision_tower)
    assert "layer_norm_eps" in tower and "num_attention_heads" in tower, "what shapes do not show"
    other = json.dumps(tower | {"layer_norm_eps": 0.5})
    with pytest.raises(CheckpointMismatchError, match=r"--vision-model .*layer_norm_eps was .* there and is 0.5 here"):
        check_function(given(stored, vision_tower=other), stored)
    check_function(given(stored, vision_tower=other, allow_model_change=["vision-model"]), stored)


def test_a_checkpoint_that_stores_fewer_arguments_is_not_refused_for_it(stored):
    check_function(given(stored), Namespace())


def test_a_misspelt_name_of_a_flag_that_may_change_is_refused(stored):
    with pytest.raises(ValueError, match="--allow-model-change rotary_base names no flag of the model"):
        check_function(given(stored, allow_model_change=["rotary_base"]), stored)


def test_a_trained_checkpoint_is_compared_with_the_run_that_takes_it_up(trained, single_rank):
    """As `setup.parse_arguments` does it, with the arguments that the trainer itself stored."""
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    saved = CheckpointReader(trained["plain"]).common_state["args"]
    args = given(saved, load=str(trained["plain"]), ckpt_step=None)
    check_identity(args, NullTokenizer(saved.vocab_size))
    assert args.true_vocab_size == saved.vocab_size and args.padded_vocab_size % args.make_vocab_size_divisible_by == 0
    with pytest.raises(CheckpointMismatchError, match="--moe-router-topk is 2 there and is 1 here"):
        check_identity(given(args, moe_router_topk=1, load=args.load), NullTokenizer(saved.vocab_size))
