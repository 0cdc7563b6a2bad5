# SPDX-License-Identifier: Apache-2.0
"""The router compared with Megatron's: padding must not affect the routing of real tokens."""

import math
from typing import Any

import pytest
import torch

from tests.models import route, router_of

LENGTHS, WIDTH = (8, 3), 48  # lengths of two samples, padded to the same length


def make_router(**config: Any) -> Any:
    """Makes a router in float64 that sends most tokens of `padded_batch` to expert 0."""
    torch.manual_seed(3)
    router = router_of(None, **config)
    router.weight.data[0] = 0.05
    return router


def padded_batch(padding: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns inputs [s, b, h] with `padding` after each sample, and their modality mask [s, b, M]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(max(LENGTHS), len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64) + 0.5
    mask = torch.zeros(*inputs.shape[:2], 2, dtype=torch.bool)
    for sample, length in enumerate(LENGTHS):
        mask[:length, sample, sample] = True  # one sample of text, one of vision
        inputs[length:, sample] = padding
    return inputs, mask


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_padding_takes_a_slot_of_an_experts_capacity(single_rank, topk, factor):
    inputs, mask = padded_batch(padding=5.0)
    config = {"moe_router_topk": topk, "moe_router_pre_softmax": topk == 1}  # Megatron asks for it with top-1
    unlimited, wanted, _ = route(make_router(**config), inputs, mask)
    limited = make_router(**config, moe_expert_capacity_factor=factor, moe_token_drop_policy="probs")
    probs, chosen, statistics = route(limited, inputs, mask)

    capacity, real = math.ceil(mask.shape[0] * mask.shape[1] * topk / 4 * factor), mask.any(-1)
    kept = torch.zeros_like(wanted)
    for expert in range(4):
        asking = [(unlimited[s, b, expert].item(), s, b) for s, b in real.nonzero() if wanted[s, b, expert]]
        for _, s, b in sorted(asking, reverse=True)[:capacity]:
            kept[s, b, expert] = True
    assert kept.sum() < (wanted & real.unsqueeze(-1)).sum(), "nothing is dropped, so the test shows nothing"
    torch.testing.assert_close(chosen, kept)
    torch.testing.assert_close(probs, unlimited * kept)
    counts = torch.stack([kept[mask[..., modality]].sum(0) for modality in range(2)])
    torch.testing.assert_close(statistics.counts, counts.to(statistics.counts.dtype))


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_the_content_of_padding_changes_which_tokens_are_dropped(single_rank, policy):
    router = make_router(moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy)
    results = [route(router, *padded_batch(padding)) for padding in (0.0, 5.0, -5.0)]
    for probs, chosen, _ in results[1:]:
        torch.testing.assert_close(chosen, results[0][1])
        torch.testing.assert_close(probs, results[0][0])


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_a_capacity_that_is_never_reached_changes_the_routing_of_real_tokens(single_rank, policy):
    inputs, mask = padded_batch()
    free, wanted, _ = route(make_router(), inputs, mask)
    probs, chosen, _ = route(make_router(moe_expert_capacity_factor=4.0, moe_token_drop_policy=policy), inputs, mask)
    real = mask.any(-1)
    torch.testing.assert_close(chosen[real], wanted[real])
    torch.testing.assert_close(probs[real], free[real])
    assert not chosen[~real].any()


def test_the_balance_of_expert_biases_counts_a_dropped_token(single_rank):
    router = make_router(
        moe_expert_capacity_factor=0.5, moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid"
    )
    _, chosen, _ = route(router, *padded_batch(padding=5.0))
    torch.testing.assert_close(router.local_tokens_per_expert, chosen.flatten(0, 1).sum(0).double())


@pytest.mark.parametrize("padding", [0.0, 5.0])
def test_the_z_loss_differs_from_the_mean_over_real_tokens(single_rank, padding):
    router = make_router(moe_z_loss_coeff=0.3)
    inputs, mask = padded_batch(padding)
    inputs.requires_grad_()
    probs, _ = router(inputs, mask)
    # Only the auxiliary gradients, since those of the output are zero.
    (gradient,) = torch.autograd.grad((probs * 0).sum(), inputs)
    leaf = inputs.detach().requires_grad_()
    logits = leaf[mask.any(-1)] @ router.weight.T
    (expected,) = torch.autograd.grad(0.3 * logits.logsumexp(-1).square().mean(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 1e-4
