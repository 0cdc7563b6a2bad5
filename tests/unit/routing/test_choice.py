# SPDX-License-Identifier: Apache-2.0
"""The bias on the choice of experts, with Megatron's own top-k functions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.choice import BiasedChoice

SETTINGS = {
    "softmax after top-k": {},
    "softmax before top-k": {"use_pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid with expert bias": {"score_function": "sigmoid", "expert_bias": torch.linspace(0.3, -0.3, 8)},
    "groups": {"use_pre_softmax": True, "num_groups": 4, "group_topk": 2},
}


def megatrons(logits, bias=None, **settings):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    by_logits = settings.get("score_function") != "sigmoid" and not settings.get("use_pre_softmax")
    replay = None if bias is None else BiasedChoice(bias, by_logits)
    return topk_routing_with_score_function(logits, 2, router_replay=replay, **settings)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_a_bias_of_zero_changes_something(name, seed):
    logits = random(6, 8, seed=seed)
    plain, biased = megatrons(logits, **SETTINGS[name]), megatrons(logits, torch.zeros(6, 8), **SETTINGS[name])
    assert all(torch.equal(a, b) for a, b in zip(plain, biased, strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@given(seed=st.integers(0, 2**31))
def test_other_experts_are_chosen_than_those_of_highest_score_plus_bias(name, seed):
    settings = SETTINGS[name]
    logits, bias = random(6, 8, seed=seed), random(6, 8, seed=seed + 1).round() * 0.3
    scores = logits.softmax(-1) if settings.get("score_function") != "sigmoid" else logits.sigmoid()
    best = scores + bias + settings.get("expert_bias", 0)
    if "num_groups" in settings:  # only experts of the two groups with the best experts
        groups = best.view(6, 4, 2).amax(-1).topk(2).indices
        best = best.masked_fill(torch.ones(6, 4).scatter(1, groups, 0).bool().repeat_interleave(2, dim=1), -9)
    chosen = torch.zeros_like(best).scatter(1, best.topk(2).indices, 1).bool()
    probs, routing_map = megatrons(logits, bias, **settings)
    assert torch.equal(routing_map, chosen)
    assert torch.equal(probs > 0, chosen)


def test_the_bias_of_minus_infinity_lets_an_expert_be_chosen():
    bias = torch.zeros(4, 8)
    bias[:, 2:6] = -torch.inf
    for settings in SETTINGS.values():
        if "num_groups" not in settings:
            assert not megatrons(random(4, 8, seed=1), bias, **settings)[1][:, 2:6].any()
