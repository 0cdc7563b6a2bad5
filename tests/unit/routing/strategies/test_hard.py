# SPDX-License-Identifier: Apache-2.0
"""Hard routing: which modality's tokens reach which experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.strategies.hard import HardConfig
from tests.models import route, router_of


def allowed(*experts: str, modalities: int = 2, number: int = 8) -> list[list[int]]:
    names = ["text", "vision", *(f"kind_{number}" for number in range(2, modalities))]
    table = HardConfig(experts).allowed(1, names, number)
    return [row.nonzero().flatten().tolist() for row in table]


def test_experts_can_be_given_as_numbers_ranges_or_shares_and_are_equal_shares_by_default():
    assert allowed() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert allowed("vision=0,2-5", "text=1,6,7") == [[1, 6, 7], [0, 2, 3, 4, 5]]
    assert allowed("text=0.75", "vision=0.25") == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert allowed(modalities=3) == [[0, 1, 2], [3, 4], [5, 6, 7]]


@given(st.integers(2, 4), st.integers(4, 100))
def test_equal_shares_of_any_number_give_each_expert_to_one_modality(modalities, number):
    own = allowed(modalities=modalities, number=number)
    assert sorted(expert for row in own for expert in row) == list(range(number))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (["text=0-7"], "must name each of text, vision once"),
        (["text=0-3", "text=4", "vision=5-7"], "must name each of text, vision once"),
        (["text=0-3", "video=4-7"], "must name each of text, vision once"),
        (["text=0-3", "vision=4-8"], "must give each of the experts 0-7 to one modality"),
        (["text=0-4", "vision=4-7"], "must give each of the experts 0-7 to one modality"),
        (["text=0-3", "vision=4-6"], "must give each of the experts 0-7 to one modality"),
        (["text=0.5", "vision=0.6"], "must give each of the experts 0-7 to one modality"),
        (["text=0.5", "vision=0.49"], "to one modality: shares add up to 1"),
        (["text=a", "vision=0-7"], "'a' is neither a list of experts"),
        (["text", "vision=0-7"], "'' is neither a list of experts"),
        (["text=a.b", "vision=0.5"], "'a.b' is neither a list of experts"),
    ],
)
def test_experts_that_are_not_a_partition_are_refused(experts, said):
    with pytest.raises(ValueError, match=said) as error:
        allowed(*experts)
    assert f"--hard-experts {' '.join(experts)}" in str(error.value)


SCORES = {
    "softmax": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid with expert bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}


@pytest.mark.parametrize("scores", SCORES)
def test_no_token_reaches_another_modalitys_expert_and_its_weights_are_the_backbones(single_rank, scores):
    """Compared with a router that has only the allowed experts; the expert bias favors forbidden experts."""
    experts = {"text": [0, 3, 5], "vision": [1, 2, 4, 6, 7]}
    config = HardConfig(tuple(f"{name}={','.join(map(str, own))}" for name, own in experts.items()))
    router = router_of(config, num_moe_experts=8, **SCORES[scores])
    generator = torch.Generator().manual_seed(1)
    router.weight.data = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
    if router.expert_bias is not None:
        router.expert_bias = torch.linspace(-2, 2, 8)
    inputs = torch.randn(6, 2, 48, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(6, 2, 2, dtype=torch.bool)
    mask[:5, 0, 0] = mask[:4, 1, 1] = True  # text, then vision; the rest is padding
    probs, chosen, statistics = route(router, inputs, mask)
    total = torch.zeros(())
    for modality, own in enumerate(experts.values()):
        rows = mask[..., modality]
        others = [expert for expert in range(8) if expert not in own]
        assert not chosen[rows][:, others].any() and (chosen[rows].sum(1) == 2).all()
        assert not statistics.counts[modality, others].any()
        reference = router_of(None, num_moe_experts=len(own), **SCORES[scores])
        reference.weight.data = router.weight.data[own]
        if router.expert_bias is not None:
            reference.expert_bias = router.expert_bias[own]
        lone_mask = torch.zeros(int(rows.sum()), 1, 2, dtype=torch.bool)
        lone_mask[..., modality] = True
        expected, _, _ = route(reference, inputs[rows].unsqueeze(1), lone_mask)
        torch.testing.assert_close(probs[rows][:, own], expected.squeeze(1))
        total = total + (probs[rows][:, own] ** 2).sum()
    (gradient,) = torch.autograd.grad(total, inputs)
    assert gradient.isfinite().all() and gradient[mask.any(-1)].abs().max() > 1e-6
    assert (chosen[~mask.any(-1)].sum(1) == 2).all(), "padding is routed like any token, as without the strategy"


def test_the_expert_bias_is_unchanged_after_the_choice(single_rank):
    router = router_of(HardConfig(), moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    before = router.expert_bias.clone()
    mask = torch.zeros(3, 1, 2, dtype=torch.bool)
    mask[..., 0] = True
    route(router, torch.randn(3, 1, 48, dtype=torch.float64), mask)
    torch.testing.assert_close(router.expert_bias, before, check_dtype=False)
    assert dict(router.named_buffers())["expert_bias"] is router.expert_bias


@given(st.permutations(range(8)), st.data())
def test_renumbered_experts_are_allowed_to_the_same_modality_as_before(order, data):
    number = data.draw(st.integers(1, 7))
    config = HardConfig((f"text={','.join(map(str, range(number)))}", f"vision={','.join(map(str, range(number, 8)))}"))
    names = ["text", "vision"]
    moved = config.renumbered({2: order, 5: order}, names, 8)
    assert torch.equal(moved.allowed(1, names, 8), config.allowed(1, names, 8)[:, list(order)])


def test_experts_whose_numbers_would_differ_between_layers_are_refused():
    with pytest.raises(ValueError, match=r"text=0-1 vision=2-3 in layer 1 and text=2-3 vision=0-1 in layer 4;"):
        HardConfig().renumbered({1: (0, 1, 2, 3), 4: (3, 2, 1, 0)}, ["text", "vision"], 4)
