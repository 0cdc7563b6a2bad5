# SPDX-License-Identifier: Apache-2.0
"""The losses within the gradient norm, and who stops at a norm that is not finite."""

import pytest
import torch
from megatron.core.optimizer import optimizer as optimizers
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler

from megatron_smar.runtime import finite_steps

GRADIENTS = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]


@pytest.fixture
def step(single_rank):
    yield finite_steps._STEP
    finite_steps._STEP.losses = None


def norm(gradients):
    return optimizers.get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gradients", [GRADIENTS, [gradient.bfloat16() for gradient in GRADIENTS], []])
def test_a_loss_that_is_not_finite_makes_the_norm_so_and_a_finite_one_leaves_it(step, gradients, value):
    reports = [{"lm loss": torch.tensor([7.0, 2.0])}, {"lm loss": torch.tensor([value, 2.0]), "other": torch.ones(1)}]
    expected = 5.0 if gradients else 0.0
    assert norm(gradients) == expected
    step.note(reports[:1])
    assert norm(gradients) == expected
    step.note(reports)
    assert not torch.tensor(norm(gradients)).isfinite()
    step.note([])  # of a pipeline stage that computes no loss
    assert norm(gradients) == expected


class Part(optimizers.MegatronOptimizer):
    """An optimizer of one parameter that notes whether it stepped."""

    def __init__(self, gradient, grad_scaler=None):
        self.gradient, self.grad_scaler, self.stepped, self.is_stub_optimizer = gradient, grad_scaler, False, True
        self.config = optimizers.OptimizerConfig(clip_grad=0.0)

    def prepare_grads(self):
        return False

    def get_grad_norm(self):
        return norm([self.gradient])

    def step_with_ready_grads(self):
        self.stepped = True
        return True

    def get_parameters(self):
        return []

    step = zero_grad = get_loss_scale = reload_model_params = state_dict = load_state_dict = sharded_state_dict = None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_optimizer_that_finds_a_norm_that_is_not_finite_has_changed_nothing(step, value):
    good = Part(torch.ones(2))
    assert optimizers.ChainedOptimizer([good]).step()[0] and good.stepped
    for scaler in (None, ConstantGradScaler(8.0)):
        bad = Part(torch.tensor([1.0, value]), scaler)
        with pytest.raises(finite_steps.NotFiniteError):
            optimizers.ChainedOptimizer([optimizers.ChainedOptimizer([bad])]).step()
        assert not bad.stepped
        assert finite_steps._STEP.optimizer is None
    scaler = DynamicGradScaler(8.0, 1.0, 2.0, 0.5, 10, 1)
    skipped = Part(torch.tensor([1.0, value]), scaler)
    assert optimizers.ChainedOptimizer([skipped]).step() == (False, None, None) and not skipped.stepped
