# SPDX-License-Identifier: Apache-2.0
"""Tests that the gradient norm includes the losses, and that optimizers stop at a norm that is not finite."""

import pytest
import torch
from megatron.core.optimizer import optimizer as optimizers
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler

from megatron_smar.runtime import finite_steps

GRADIENTS = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]


@pytest.fixture
def step(single_rank):
    yield finite_steps._STEP
    finite_steps._STEP.faults = None


def norm(gradients):
    return optimizers.get_grad_norm_fp32(gradients, grad_stats_parallel_group=torch.distributed.group.WORLD)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gradients", [GRADIENTS, [gradient.bfloat16() for gradient in GRADIENTS], []])
def test_a_loss_that_is_not_finite_makes_the_norm_not_finite_and_a_finite_loss_leaves_it(step, gradients, value):
    reports = [{"lm loss": torch.tensor([7.0, 2.0])}, {"lm loss": torch.tensor([value, 2.0]), "other": torch.ones(1)}]
    expected = 5.0 if gradients else 0.0
    assert norm(gradients) == expected
    step.note(reports[:1], [torch.ones(3)])
    assert norm(gradients) == expected
    step.note(reports, [])
    assert not torch.tensor(norm(gradients)).isfinite()
    assert step.has_faulty_loss()
    step.note([], [])  # as on a pipeline stage that computes no loss
    assert norm(gradients) == expected
    step.note(reports[:1], [torch.ones(3), torch.tensor([0.0, value])])  # copies are not in the norm
    assert not torch.tensor(norm(gradients)).isfinite() and not step.has_faulty_loss()


class Part(optimizers.MegatronOptimizer):
    """An optimizer with one gradient that records whether it stepped."""

    def __init__(self, gradient, grad_scaler=None, group=None):
        self.group = group
        self.gradient, self.grad_scaler, self.stepped, self.is_stub_optimizer = gradient, grad_scaler, False, True
        self.config = optimizers.OptimizerConfig(clip_grad=0.0)

    def prepare_grads(self):
        found = self.grad_scaler is not None and not bool(self.gradient.isfinite().all())
        if self.grad_scaler is not None:
            self.grad_scaler.update(found)
        return found

    def get_grads_for_grad_norm(self, grad_norm_group=None):
        return [self.gradient] if grad_norm_group == self.group else []

    def has_grad_norm_group(self, grad_norm_group):
        return grad_norm_group == self.group

    def step_with_ready_grads(self):
        self.stepped = True
        return True

    def get_parameters(self):
        return []

    step = zero_grad = get_loss_scale = reload_model_params = state_dict = load_state_dict = sharded_state_dict = None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_optimizer_changes_nothing_if_the_norm_is_not_finite(step, value):
    good = Part(torch.ones(2))
    assert optimizers.ChainedOptimizer([good]).step()[0] and good.stepped
    for scaler in (None, ConstantGradScaler(8.0)):
        bad = Part(torch.tensor([1.0, value]), scaler)
        with pytest.raises(finite_steps.NotFiniteError):
            optimizers.ChainedOptimizer([optimizers.ChainedOptimizer([bad])]).step()
        assert not bad.stepped
        assert finite_steps._STEP.optimizer is None
    apart = Part(torch.tensor([1.0, value]), group="mtp")  # heads whose gradients are clipped separately
    with pytest.raises(finite_steps.NotFiniteError):
        optimizers.ChainedOptimizer([good, apart]).step()
    assert not apart.stepped
    scaler = DynamicGradScaler(8.0, 1.0, 2.0, 0.5, 10, 1)
    skipped = Part(torch.tensor([1.0, value]), scaler)
    assert optimizers.ChainedOptimizer([skipped]).step() == (False, None, None) and not skipped.stepped


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_an_overflow_in_one_of_the_chained_optimizers_lowers_the_loss_scale_of_all(step, faulty):
    scalers = [DynamicGradScaler(8.0, 1.0, 2.0, 0.5, 2, 1) for _ in range(3)]
    parts = [Part(torch.ones(2), scaler) for scaler in scalers]
    nested = optimizers.ChainedOptimizer([optimizers.ChainedOptimizer(parts[:2]), parts[2]])
    nested.step()
    parts[faulty].gradient = torch.tensor([float("inf")])
    assert nested.step() == (False, None, None)
    assert [scaler.scale.item() for scaler in scalers] == [4.0] * 3
    parts[faulty].gradient = torch.ones(2)
    for expected in (4.0, 8.0):  # the scales also grow together
        assert nested.step()[0]
        assert [scaler.scale.item() for scaler in scalers] == [expected] * 3
