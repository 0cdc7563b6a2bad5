# SPDX-License-Identifier: Apache-2.0
"""What the router does for every strategy, tested with a strategy that uses the complete interface."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics
from megatron_smar.routing.strategies import STRATEGIES
from megatron_smar.routing.strategies.base import (
    AuxiliaryLoss,
    Metric,
    RoutedLayer,
    RoutingStrategy,
    StrategyConfig,
    Weighted,
)
from tests.launch import on_two_ranks
from tests.models import router_of


@dataclass(frozen=True)
class ProbeConfig(StrategyConfig):
    """Settings of the test strategy.

    Attributes:
        coeff: Weight of its losses.
    """

    name = "probe"
    title = "every part of the interface"
    keeps_state = True
    biases_choice = True
    metrics = (Metric("probe loss"), Metric("gate loss"), Metric("probe mean", weighted=True))

    coeff: float = 0.5

    def build(self, layer: RoutedLayer) -> RoutingStrategy:
        return Probe(self, layer)


class Probe(RoutingStrategy):
    """Has its own gates, a loss of the mean logits per modality, a loss of the gate, and a load over all steps."""

    def __init__(self, config: ProbeConfig, layer: RoutedLayer) -> None:
        super().__init__(config, layer)
        self.gates = nn.Parameter(torch.zeros(layer.num_modalities, layer.num_experts, layer.hidden_size))
        self.register_buffer("seen", torch.zeros(layer.num_experts))
        self.register_buffer("load", torch.zeros(layer.num_experts))
        self.register_buffer("tokens", torch.zeros(layer.num_modalities))
        self.register_buffer("preferred", torch.zeros(layer.num_modalities, layer.num_experts))

    def logits(self, hidden, modality_mask, gate) -> Tensor:
        return gate(hidden) + torch.einsum("sbh,meh,sbm->sbe", hidden, self.gates, modality_mask.to(hidden.dtype))

    def choice_bias(self, modality_mask) -> Tensor:
        return modality_mask.to(self.preferred.dtype) @ self.preferred

    def sums(self, tokens) -> dict[str, Tensor]:
        return {"logits": tokens.modality_mask.to(tokens.logits.dtype).t() @ tokens.logits}

    def losses(self, routing) -> dict[str, AuxiliaryLoss]:
        means = routing.sums["logits"] / routing.statistics.tokens.unsqueeze(1)
        return {"probe loss": AuxiliaryLoss(means.square().sum(), self.config.coeff)}

    def weight_losses(self, gate, iteration) -> dict[str, AuxiliaryLoss]:
        return {"gate loss": AuxiliaryLoss(gate.square().sum(), self.config.coeff)}

    def measures(self, routing) -> dict[str, Weighted]:
        return {"probe mean": Weighted(routing.sums["logits"].mean(), routing.statistics.tokens.sum())}

    def accumulate(self, routing) -> None:
        self.seen += routing.statistics.counts.sum(0)

    def step_sums(self, tokens) -> dict[str, Tensor]:
        return {"tokens": tokens.modality_mask.sum(0).to(tokens.weights.dtype)}

    def update(self, sums) -> None:
        self.load += self.seen
        self.tokens += sums["tokens"]
        self.seen.zero_()


def test_a_loss_whose_name_megatron_would_not_average_is_refused():
    with pytest.raises(ValueError, match="'probe' is not weighted, so it is a loss: end its name in 'loss'"):
        Metric("probe")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulated_statistics_stay_exact_in_a_model_of_half_precision(single_rank, dtype):
    strategy = router_of(ProbeConfig()).strategy
    strategy.seen = (strategy.seen + 1 + 2**-20).float()
    strategy.to(dtype)
    assert strategy.gates.dtype == dtype
    assert strategy.seen.dtype == torch.float32 and float(strategy.seen[0]) == 1 + 2**-20


@pytest.fixture
def step(single_rank):
    """Returns a router, its input and its modality mask."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    router = router_of(ProbeConfig())
    generator = torch.Generator().manual_seed(4)
    router.weight.data = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
    router.strategy.gates.data = torch.randn(router.strategy.gates.shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(5, 2, 48, generator=generator, dtype=torch.float64)
    mask = torch.zeros(5, 2, 2, dtype=torch.bool)
    mask[:, 0, 0] = mask[:3, 1, 1] = True
    return router, inputs, mask


def test_logits_sums_and_both_kinds_of_losses_give_the_gradients_computed_by_hand(step):
    router, inputs, mask = step
    output = router.finish(router(inputs, mask)[0])
    (output * 0).sum().backward()
    gate, gates = (tensor.detach().requires_grad_() for tensor in (router.weight, router.strategy.gates))
    loss = gate.square().sum()
    for modality in range(2):
        rows = inputs[mask[..., modality]]
        loss = loss + (rows @ (gate + gates[modality]).T).mean(0).square().sum()
    (0.5 * loss).backward()
    torch.testing.assert_close(router.weight.grad, gate.grad)
    torch.testing.assert_close(router.strategy.gates.grad, gates.grad)


def test_losses_and_measures_are_reported_in_training_but_not_in_evaluation(step):
    router, inputs, mask = step
    reports = []
    router.recorders.append(reports.append)
    router.finish(router(inputs, mask)[0])
    router.eval()
    router.finish(router(inputs, mask)[0])
    training, evaluation = reports
    assert set(training.losses) == {"probe loss", "gate loss"}
    assert set(training.measures) == {"mrd distance", "probe mean"}
    assert float(training.measures["probe mean"].weight) == 8
    assert not evaluation.losses and not evaluation.measures
    torch.testing.assert_close(evaluation.statistics.counts, training.statistics.counts)


def test_state_is_updated_once_per_step_and_a_saved_state_includes_the_last_step(step):
    router, inputs, mask = step
    strategy = router.strategy

    def micro_batch(of) -> None:
        of.finish(of(inputs, mask)[0])

    for iteration, loads in ((0, 0), (0, 0), (1, 32), (2, 48)):
        router.step.iteration = iteration
        micro_batch(router)
        assert strategy.load.sum() == loads, "two micro-batches of 8 tokens and 2 experts in step 0, one in step 1"
        assert strategy.tokens.sum() * 2 == loads
    router.eval()
    micro_batch(router)
    router.train()
    router.step.settle()  # as the model does before it is saved
    assert strategy.load.sum() == 64
    resumed = router_of(ProbeConfig())
    resumed.load_state_dict(router.state_dict())
    for each in (router, resumed):
        each.step.iteration = 3
        micro_batch(each)
        assert each.strategy.load.sum() == 64, "evaluation counts nothing, and nothing is counted twice"


def test_a_recomputed_layer_counts_once(step):
    router, inputs, mask = step
    with torch.no_grad():  # the first of the two passes
        router.finish(router(inputs, mask)[0])
    router.finish(router(inputs, mask)[0])
    assert router.strategy.seen.sum() == 16


def test_a_preferred_expert_is_not_chosen_or_padding_chooses_it_too(step):
    router, inputs, mask = step
    before = router(inputs, mask)[1].view(*mask.shape[:2], -1)
    router.strategy.preferred[1, 3] = 1
    after = router(inputs, mask)[1].view(*mask.shape[:2], -1)
    assert after[mask[..., 1]][:, 3].all() and not before[mask[..., 1]][:, 3].all()
    assert torch.equal(after[~mask[..., 1]], before[~mask[..., 1]]), "text and padding choose as before"


def _own_sums(rank: int, store: str, results) -> None:
    """Runs one of two ranks, each with its own numbers, and computes a loss of the global sums."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    share = (torch.arange(6, dtype=torch.float64).view(2, 3) * (rank + 1)).requires_grad_()
    local = RoutingStatistics(torch.ones(2, 4).double(), torch.ones(2, 4).double(), torch.ones(2).double())
    statistics, sums = PendingStatistics(local, dist.group.WORLD, {"a": share, "b": share.sum()}).wait()
    (sums["a"].square().sum() + sums["b"]).backward()
    results[rank] = (statistics.counts.tolist(), sums["a"].detach(), float(sums["b"]), share.grad)
    dist.destroy_process_group()


def test_a_strategys_sums_are_over_all_ranks_and_each_rank_gets_its_share_of_the_gradient(tmp_path):
    results = on_two_ranks(_own_sums, tmp_path)
    total = 3 * torch.arange(6, dtype=torch.float64).view(2, 3)
    for counts, a, b, gradient in results.values():
        assert counts == [[2.0] * 4] * 2
        torch.testing.assert_close(a, total)
        assert b == 45
        torch.testing.assert_close(gradient, 2 * total + 1)


def test_a_pass_without_gradients_and_recorders_launches_no_reduction(step):
    router, inputs, mask = step
    with torch.no_grad():
        router(inputs, mask)
    assert router._pending is None, "the first pass of a recomputed layer"
    router.eval()
    router(inputs, mask)
    assert router._pending is None, "evaluation"


STATEFUL = {"smoes": {"bins": 2, "scores": "gaussian"}}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_says_of_all_its_state_whether_it_counts_experts(name):
    """Otherwise its checkpoints cannot be placed, or state would be left behind when experts are moved."""
    config = STRATEGIES[name](**STATEFUL.get(name, {}))
    state = config.build(
        RoutedLayer(num_experts=6, top_k=2, hidden_size=7, modalities=("text", "vision", "chart"))
    ).state_dict()
    assert set(state) <= set(config.expert_axes)
    for key, tensor in state.items():
        axis = config.expert_axes[key]
        assert [number for number, size in enumerate(tensor.shape) if size == 6] == ([] if axis is None else [axis])
