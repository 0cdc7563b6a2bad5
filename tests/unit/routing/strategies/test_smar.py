# SPDX-License-Identifier: Apache-2.0
"""SMAR's settings by layer and by step, through the router."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_smar.routing.mrd import layer_distance
from megatron_smar.routing.statistics import PendingStatistics, RoutingStatistics, routing_statistics
from megatron_smar.routing.strategies.base import LayerRouting, RoutedLayer
from megatron_smar.routing.strategies.none import NoneConfig
from megatron_smar.routing.strategies.smar import SMAR_LOSS, LayerSettings, SmarConfig, smar_loss
from tests.launch import on_two_ranks
from tests.models import router_of

FAR = SmarConfig(d_min=50.0, d_max=60.0, coeff=0.5)  # the gradient is not zero


@pytest.fixture
def gradient(single_rank):
    """Returns a function from a strategy's config, a layer and a step to the gradient of its loss by the gate."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    def of(config, layer=1, iteration=0):
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        router = router_of(config)
        router.set_layer_number(layer)
        router.step.iteration = iteration
        generator = torch.Generator().manual_seed(4)
        router.weight.data = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
        inputs = torch.randn(9, 2, 48, generator=generator, dtype=torch.float64)
        mask = torch.zeros(9, 2, 2, dtype=torch.bool)
        mask[:, 0, 0] = mask[:7, 1, 1] = True
        (router.finish(router(inputs, mask)[0]) * 0).sum().backward()
        return router.weight.grad

    return of


def test_a_layers_own_coefficient_or_band_does_not_act_or_acts_in_another_layer(gradient):
    own = replace(FAR, layers={2: LayerSettings(coeff=2.0), 3: LayerSettings(band=(0.0, 100.0))})
    common = gradient(own, layer=1)
    assert common.abs().max() > 1e-4
    torch.testing.assert_close(gradient(own, layer=2), 4 * common)
    assert not gradient(own, layer=3).any(), "inside its own band"
    torch.testing.assert_close(gradient(own, layer=4), common)


def test_the_loss_acts_before_its_first_step_or_after_its_last(gradient):
    timed = replace(FAR, start_iter=3, end_iter=5)
    acts = [bool(gradient(timed, iteration=step).any()) for step in range(7)]
    assert acts == [False, False, False, True, True, False, False]


def test_a_loss_that_is_only_reported_acts_in_a_layer_with_a_coefficient_of_its_own(gradient):
    assert not gradient(NoneConfig(replace(FAR, layers={1: LayerSettings(coeff=2.0)}))).any()


AVERAGED = SmarConfig(d_min=50.0, d_max=60.0, coeff=0.5, average_steps=4, eps=1e-3)
STEPS, MICRO_BATCHES, TOKENS, EXPERTS = 3, 2, 12, 5


def tokens_of(step, micro_batch):
    """Returns the weights, the map and the modalities of a micro-batch's tokens; the last step has no text."""
    generator = torch.Generator().manual_seed(10 * step + micro_batch)
    weights = torch.rand(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator) < 0.5
    ids = torch.arange(TOKENS) % 2
    return weights * chosen, chosen, ids if step + 1 < STEPS else torch.ones_like(ids)


def averaged_losses(strategy, rows, group):
    """Runs all steps on some of the tokens; returns each micro-batch's loss and gradient by the weights."""
    found = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            weights, chosen, ids = (part[rows] for part in tokens_of(step, micro_batch))
            leaf = weights.clone().requires_grad_()
            statistics, sums = PendingStatistics(routing_statistics(leaf, chosen, ids, 2), group).wait()
            nothing = torch.zeros((), dtype=torch.float64)
            routing = LayerRouting(1, step, statistics, sums, nothing, nothing)
            value = strategy.losses(routing)[SMAR_LOSS].value
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
            with torch.no_grad():
                strategy.accumulate(routing)
        strategy.update({})
    return found


def averaged_by_hand():
    """Computes the same from all tokens, from the definition: each step has 3/4 of the weight of the next."""
    found, steps = [], []
    for step in range(STEPS):
        batches = [tokens_of(step, micro_batch) for micro_batch in range(MICRO_BATCHES)]
        past = [
            [part * 0.75 ** (step - earlier) for part in sums] for earlier, both in enumerate(steps) for sums in both
        ]
        for weights, chosen, ids in batches:
            leaf = weights.clone().requires_grad_()
            own = routing_statistics(leaf, chosen, ids, 2)
            total = RoutingStatistics(*(sum(parts) for parts in zip(own, *past, strict=True)))
            value = smar_loss(layer_distance(total, 1, 1e-3)[0], 50.0, 60.0)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        steps.append([routing_statistics(*batch, 2) for batch in batches])
    return found


def test_averaged_loss_or_its_gradient_differs_from_the_definition():
    strategy = AVERAGED.build(RoutedLayer(EXPERTS, 1, 8, 2)).double()
    for found, expected in zip(averaged_losses(strategy, slice(None), None), averaged_by_hand(), strict=True):
        assert expected[1].abs().max() > 1e-4
        torch.testing.assert_close(found, expected)


def _on_a_rank(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    strategy = AVERAGED.build(RoutedLayer(EXPERTS, 1, 8, 2)).double()
    results[rank] = averaged_losses(strategy, slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2), dist.group.WORLD)
    dist.destroy_process_group()


def test_averaged_loss_or_its_gradient_on_two_ranks_differs_from_one_process(tmp_path):
    results = on_two_ranks(_on_a_rank, tmp_path)
    for (value, gradient), first, second in zip(averaged_by_hand(), results[0], results[1], strict=True):
        torch.testing.assert_close((first[0], second[0]), (value, value))
        torch.testing.assert_close(torch.cat([first[1], second[1]]), gradient)


def test_a_resumed_run_has_lost_the_earlier_steps(single_rank):
    router = router_of(replace(AVERAGED, eps=1e-6))
    inputs = torch.randn(9, 2, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask = torch.zeros(9, 2, 2, dtype=torch.bool)
    mask[:, 0, 0] = mask[:7, 1, 1] = True
    for iteration in range(2):
        router.step.iteration = iteration
        router.finish(router(inputs * (iteration + 1), mask)[0])
    router.step.settle()  # as before a checkpoint is saved
    assert router.strategy.past.any()
    resumed = router_of(replace(AVERAGED, eps=1e-6))
    resumed.load_state_dict(router.state_dict())
    losses = []
    for each in (router, resumed):
        each.observers.append(lambda report: losses.append(report.losses[SMAR_LOSS]))
        each.step.iteration = 2
        each.finish(each(inputs * 3, mask)[0])
    torch.testing.assert_close(losses[0], losses[1])
