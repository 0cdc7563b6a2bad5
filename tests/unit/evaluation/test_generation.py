# SPDX-License-Identifier: Apache-2.0
"""Continuations of a real model with the cache, compared with those computed from the full logits of each step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import build_hf_model, build_model
from tests.unit.evaluation.test_evaluator import IMAGE, evaluator_of, logits_of, sample

MODELS = {
    "grouped queries": {},
    "multi-head attention": {"num_query_groups": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, single_rank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder)
    torch.manual_seed(5)
    model = build_model(str(folder), **MODELS[request.param]).eval()
    for parameter in model.language_model.output_layer.parameters():
        parameter.data.mul_(20)  # a random model's probabilities are almost equal
    return model


def recomputed(model, prompt, number: int) -> list[int]:
    """Returns the most likely continuation, from the logits of the complete sequence at each step."""
    ids = prompt.input_ids.clone()
    for _ in range(number):
        ids = torch.cat([ids, logits_of(model, ids, prompt.pixel_values)[-1].argmax()[None]])
    return ids[len(prompt.input_ids) :].tolist()


def never(number: int, new: list[int]) -> bool:
    return False


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_continuation_takes_the_most_likely_token_at_the_end_of_each_prompt(model, batch_size):
    from megatron_smar.evaluation.generation import generate

    prompts = [sample(length, seed, 0) for length, seed in ((7, 4), (12, 5), (8, 6), (7, 7))]
    limits = [3, 6, 1, 0]
    expected = [recomputed(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert generate(evaluator_of(model, batch_size=batch_size), prompts, limits, never) == expected


def test_a_complete_continuation_ends_with_the_token_that_completed_it(model):
    from megatron_smar.evaluation.generation import generate

    prompts = [sample(length, seed, 0) for length, seed in ((7, 4), (12, 5))]
    expected = [recomputed(model, prompt, 5) for prompt in prompts]
    stop = expected[0][1]
    found = generate(evaluator_of(model), prompts, [5, 5], lambda number, new: number == 0 and new[-1] == stop)
    assert found == [expected[0][: expected[0].index(stop) + 1], expected[1]]


def test_the_cached_logits_equal_the_recomputed_ones(model):
    """Equal continuations alone would hide small errors."""
    from megatron_smar.evaluation.generation import generate

    prompts = [sample(length, seed, 0) for length, seed in ((7, 4), (12, 5))]
    seen = []
    handle = model.register_forward_hook(lambda _, __, output: seen.append(output[:, -1].detach()))
    found = generate(evaluator_of(model), prompts, [4, 4], never)
    handle.remove()
    for row, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        full = logits_of(model, torch.cat([prompt.input_ids, torch.tensor(new)]), prompt.pixel_values)
        first = len(prompt.input_ids) - 7  # both rows' first 7 tokens are read together
        for step in range(4):
            torch.testing.assert_close(
                seen[first + step][row], full[len(prompt.input_ids) - 1 + step], atol=1e-4, rtol=0
            )


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)).map(lambda p: (max(p), min(p))), min_size=1),
    st.integers(1, 5),
)
def test_every_prompt_is_in_one_batch_whose_common_part_holds_all_its_images(single_rank, prompts, size):
    from megatron_smar.evaluation.generation import plan_batches

    lengths, ends = zip(*prompts, strict=True)
    batches = plan_batches(lengths, ends, size)
    assert sorted(number for batch in batches for number in batch) == list(range(len(prompts)))
    for batch in batches:
        assert len(batch) <= size
        assert max(ends[number] for number in batch) <= min(lengths[number] for number in batch)


def test_sequence_parallelism_is_on_again_after_an_error(model):
    from megatron_smar.evaluation.generation import decoding_settings

    layer = model.language_model.decoder.layers[0].self_attention.linear_qkv
    layer.sequence_parallel = True
    with pytest.raises(KeyError), decoding_settings(model):
        assert layer.sequence_parallel is False
        raise KeyError
    assert layer.sequence_parallel is True
    layer.sequence_parallel = False
