# SPDX-License-Identifier: Apache-2.0
"""SMAR's settings by layer and by step, through the router."""

from dataclasses import replace

import pytest
import torch

from megatron_smar.routing.strategies.none import NoneConfig
from megatron_smar.routing.strategies.smar import LayerSettings, SmarConfig
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
