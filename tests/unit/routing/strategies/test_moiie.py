# SPDX-License-Identifier: Apache-2.0
"""MoIIE: which experts each modality's gate may choose, and the balance loss of each gate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_smar.routing.statistics import RoutingStatistics
from megatron_smar.routing.strategies import RoutedLayer
from megatron_smar.routing.strategies.base import LayerRouting, RoutedTokens
from megatron_smar.routing.strategies.moiie import MOIIE_LOSS, MoiieConfig
from tests.models import route, router_of

NAMES = ("text", "vision")


def allowed(*experts: str, names: tuple[str, ...] = NAMES, number: int = 8) -> list[list[int]]:
    table = MoiieConfig(experts).allowed(1, names, number)
    return [row.nonzero().flatten().tolist() for row in table]


def test_each_modality_has_its_own_experts_and_the_shared_ones():
    assert allowed() == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]
    assert allowed(number=4) == [[0, 1, 2], [1, 2, 3]]
    assert allowed("vision=0", "shared=2,5-7", "text=1,3,4") == [[1, 2, 3, 4, 5, 6, 7], [0, 2, 5, 6, 7]]
    assert allowed("text=0.5", "shared=0.25", "vision=0.25") == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7]]
    assert allowed(names=(*NAMES, "chart"), number=12) == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [2, 3, 4, 5, 6, 7, 8, 9],
        [2, 3, 4, 5, 6, 7, 10, 11],
    ]


@given(st.integers(2, 4), st.integers(4, 100))
def test_by_default_half_of_any_number_of_experts_is_shared_and_the_rest_is_divided_evenly(modalities, number):
    table = MoiieConfig().allowed(1, ["text", *(f"kind_{n}" for n in range(1, modalities))], number)
    shared = table.all(0)
    own = (table & ~shared).sum(1)
    assert table.any(0).all() and (table & ~shared).sum(0).max() <= 1
    assert abs(int(shared.sum()) - number / 2) <= 1 and int(own.max() - own.min()) <= 1


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (["text=0-3", "vision=4-7"], "must name each of text, shared, vision once, as text=0-1 shared=2-3 vision=4-5"),
        (["text=0-3", "shared=4", "vision=5-6"], "must give each of the experts 0-7 to one group"),
        (["text=0-3", "shared=3-5", "vision=6-7"], "must give each of the experts 0-7 to one group"),
        (["text=0.5", "shared=0.5", "vision=0.5"], "to one group: shares add up to 1"),
        (["text=a", "shared=1", "vision=2-7"], "'a' is neither a list of experts"),
    ],
)
def test_experts_that_are_not_a_partition_are_refused(experts, said):
    with pytest.raises(ValueError, match=said) as error:
        allowed(*experts)
    assert f"--moiie-experts {' '.join(experts)}" in str(error.value)


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"--moiie-coeff is -0.1; it must be 0 or more \(the paper's is 0.001\)"):
        MoiieConfig(coeff=-0.1)
    with pytest.raises(ValueError, match="--image-modalities has shared"):
        allowed(names=("text", "vision", "shared"))
    for function in ("softmax", "sigmoid"):
        MoiieConfig().check(SimpleNamespace(moe_router_score_function=function), None)
    with pytest.raises(ValueError, match="--moe-router-score-function sqrtsoftplus has no finite gradient"):
        MoiieConfig().check(SimpleNamespace(moe_router_score_function="sqrtsoftplus"), None)


SCORES = {
    "softmax": {},
    "sigmoid with expert bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}


def random_router(scores: str = "softmax", coeff: float = 0.5):
    """Returns a router in float64 with random gates, an input [7, 2, 48], and the modality of each position."""
    router = router_of(MoiieConfig(coeff=coeff), num_moe_experts=8, **SCORES[scores])
    generator = torch.Generator().manual_seed(3)
    for parameter in (router.weight, *router.strategy.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
    if router.expert_bias is not None:
        router.expert_bias = torch.linspace(-2, 2, 8)
    ids = torch.tensor([[0, 1], [1, 0], [1, 1], [-1, 1], [0, -1], [1, 0], [0, 0]])
    return router, torch.randn(7, 2, 48, generator=generator, dtype=torch.float64), ids


@pytest.mark.parametrize("scores", SCORES)
def test_no_token_reaches_an_expert_outside_of_its_groups(single_rank, scores):
    router, hidden, ids = random_router(scores)
    _, chosen, _ = route(router, hidden, ids.unsqueeze(-1) == torch.arange(2))
    reached = [{int(e) for row in chosen[ids == modality] for e in row.nonzero()} for modality in (0, 1)]
    assert reached[0] <= {0, 1, 2, 3, 4, 5} and reached[1] <= {2, 3, 4, 5, 6, 7}
    assert len(reached[0]) > 2 and len(reached[1]) > 2, "otherwise this router could not show it"
    assert (chosen.sum(-1) == 2).all()


def reference_loss(hidden, gates, ids, chosen, groups, sigmoid: bool) -> float:
    """Returns the sum over the modalities of E_m sum_e f_me P_me, token by token in NumPy."""
    total = 0.0
    for modality, own in enumerate(groups):
        places = [place for place in np.ndindex(*ids.shape) if ids[place] == modality]
        f, p = np.zeros(8), np.zeros(8)
        for place in places:
            logits = gates[modality][own] @ hidden[place]
            scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits - logits.max())
            p[own] += scores / scores.sum() / len(places)
            f += chosen[place] / (2 * len(places))
        total += len(own) * (f * p).sum()
    return total


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("present", ["both", "text only", "nothing but padding"])
def test_the_loss_is_the_papers(single_rank, scores, present):
    router, hidden, ids = random_router(scores)
    if present != "both":
        ids = ids.clamp(max=0 if present == "text only" else -1)
    reports = []
    router.observers.append(reports.append)
    output, chosen = router(hidden, ids.unsqueeze(-1) == torch.arange(2))
    router.finish(output)
    gates = [gate.weight.detach().numpy() for gate in (router, router.strategy.gates["1"])]
    groups = [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7]]
    where = chosen.view(7, 2, 8).numpy()
    expected = reference_loss(hidden.numpy(), gates, ids.numpy(), where, groups, sigmoid="sigmoid" in scores)
    assert float(reports[0].losses[MOIIE_LOSS]) == pytest.approx(expected, rel=1e-12)
    assert (expected == 0) == (present == "nothing but padding")


def test_the_loss_is_one_per_gate_where_the_load_is_even():
    strategy = MoiieConfig().build(RoutedLayer(8, 2, 1, ("text", "vision")))
    table = MoiieConfig().allowed(1, NAMES, 8)
    tokens = torch.tensor([12.0, 30.0])
    counts = table * (tokens * 2 / 6).unsqueeze(1)
    statistics = RoutingStatistics(counts, counts, tokens)
    sums = {"scores": table * (tokens / 6).unsqueeze(1)}
    losses = strategy.losses(LayerRouting(1, 0, statistics, sums, torch.zeros(()), torch.ones(()), table))
    assert float(losses[MOIIE_LOSS].value) == pytest.approx(2.0)
    assert losses[MOIIE_LOSS].coefficient == 0.001


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_gradient_of_the_loss_is_exact_also_next_to_forbidden_experts(scores):
    strategy = MoiieConfig().build(RoutedLayer(8, 2, 1, ("text", "vision"), score_function=scores))
    table = MoiieConfig().allowed(1, NAMES, 8)
    mask = torch.tensor([0, 1, 1, -1, 0, 1]).unsqueeze(-1) == torch.arange(2)
    forbidden = (mask.double() @ (~table).double()) > 0
    counts = torch.rand(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    statistics = RoutingStatistics(counts, counts, mask.sum(0).double())

    def loss(logits):
        masked = logits.masked_fill(forbidden, -torch.inf)
        routed = RoutedTokens(torch.empty(0), masked, logits, logits > 0, mask)
        routing = LayerRouting(1, 0, statistics, strategy.sums(routed), torch.zeros(()), torch.ones(()), table)
        return strategy.losses(routing)[MOIIE_LOSS].value

    logits = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    assert torch.autograd.gradcheck(loss, logits)
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert (gradient[forbidden] == 0).all() and (gradient[3] == 0).all() and gradient.abs().max() > 1e-3


def test_the_balance_loss_of_a_gate_moves_this_gate_only(single_rank):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    gradients = []
    for coeff in (0.5, 0.0):
        router, hidden, ids = random_router(coeff=coeff)
        ids = ids.clamp(max=0)  # text and padding
        (router.finish(router(hidden, ids.unsqueeze(-1) == torch.arange(2))[0]) * 0).sum().backward()
        gradients.append([router.weight.grad, router.strategy.gates["1"].weight.grad])
    (text, vision), (text_without, _) = gradients
    assert text.abs().max() > 1e-3 and (text_without == 0).all() and (vision == 0).all()


def test_the_groups_keep_their_experts_when_experts_are_moved():
    config, names = MoiieConfig(("text=0-1", "shared=2-5", "vision=6-7")), ("text", "vision")
    order = [6, 7, 2, 0, 1, 3, 4, 5]  # which expert is at each place
    moved = config.renumbered({1: order, 2: order}, names, 8)
    assert moved.experts == ("text=3-4", "shared=2,5-7", "vision=0-1")
    assert torch.equal(moved.allowed(1, names, 8), config.allowed(1, names, 8)[:, order])
    with pytest.raises(ValueError, match="--moiie-experts holds for all layers"):
        config.renumbered({1: order, 2: list(range(8))}, names, 8)
