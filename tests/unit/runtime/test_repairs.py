# SPDX-License-Identifier: Apache-2.0
"""Tests of the repairs that only save time: results are those of the Megatron functions that they replace."""

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy, vocab_parallel_cross_entropy
from megatron.core.transformer.moe import token_dispatcher

from megatron_smar.runtime.adaptation import Where
from tests.unit.runtime.interpreter import python

SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def _adapted(single_rank):
    """Installs the adaptations in this process."""


@pytest.mark.parametrize("name", ["copy_no_sorted_tokens", "find_largest_logits_only"])
def test_a_repair_that_saves_time_is_left_out_on_a_device(name):
    from megatron_smar import runtime

    (found,) = [a for a in runtime.adaptations() if a.name == name]
    assert found.where is Where.ANYWHERE


@given(SIZES, st.randoms(), st.booleans(), st.booleans())
def test_sorted_tokens_their_probabilities_and_gradients_equal_megatrons(sizes, random, shuffle, weighted):
    order = list(range(len(sizes)))
    if shuffle:
        random.shuffle(order)
    ours, theirs = (
        sort_and_differentiate(sort, sizes, order, weighted)
        for sort in (token_dispatcher.sort_chunks_by_idxs, token_dispatcher.sort_chunks_by_idxs.__wrapped__)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one is other is None or torch.equal(one, other)


def sort_and_differentiate(sort, sizes: list[int], order: list[int], weighted: bool) -> list[torch.Tensor | None]:
    """Returns a sorting's tokens and probabilities, then the gradients of its two inputs."""
    tokens = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    probs = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(1)).requires_grad_() if weighted else None
    out, chosen = sort(tokens, torch.tensor(sizes), torch.tensor(order), probs=probs)
    scale = torch.arange(1.0, len(out) + 1)
    loss = (out * scale[:, None]).sum() + ((chosen * scale).sum() if weighted else 0)
    loss.backward()
    return [out, chosen, tokens.grad, probs.grad if weighted else None]


def test_tokens_that_are_sorted_already_are_not_copied():
    tokens, probs = torch.randn(5, 3), torch.rand(5)
    out, chosen = token_dispatcher.sort_chunks_by_idxs(tokens, torch.tensor([2, 0, 3]), torch.arange(3), probs=probs)
    assert out is tokens and chosen is probs


@pytest.mark.parametrize("fused", [False, True])
def test_on_cuda_a_repair_that_saves_time_is_missing_or_changes_the_fused_kernel(fused):
    code = f"""
import torch
torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)  # all that detection calls
from megatron_smar import runtime
assert runtime.install() == "cuda"
from megatron.core.transformer.moe import moe_utils, token_dispatcher
tokens = torch.randn(5, 3)
if {fused}:  # Transformer Engine's kernel, which needs a GPU
    calls = []
    moe_utils.HAVE_TE = True
    moe_utils.fused_sort_chunks_by_index = lambda *given: calls.append(given) or tokens + 1
out, _ = token_dispatcher.sort_chunks_by_idxs(tokens, torch.tensor([2, 0, 3]), torch.arange(3), fused={fused})
assert (out is tokens) != {fused} and (not {fused} or len(calls) == 1)
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
assert "amax" in VocabParallelCrossEntropy.calculate_logits_max.__code__.co_names
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, nan, inf, -inf]))
def test_the_largest_logit_or_the_loss_differs_from_torchs_maximum(seed, dtype, special):
    logits = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if special is not None:
        logits[1, 0, 5] = special
    expected = logits.float().max(dim=-1).values
    as_float, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert as_float.dtype == torch.float32
    torch.testing.assert_close(largest, expected, rtol=0, atol=0, equal_nan=True)


def test_the_cross_entropy_or_its_gradient_differs_from_torchs():
    logits = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.randint(11, (3, 2), generator=torch.Generator().manual_seed(2))
    found = vocab_parallel_cross_entropy(logits.clone(), labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(found.flatten(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected)))
