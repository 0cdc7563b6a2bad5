# SPDX-License-Identifier: Apache-2.0
"""Tests that the gradient norm includes the losses, and that optimizers stop at, or skip, a norm that is not finite."""

import pytest
import torch
from megatron.core.optimizer import optimizer as optimizers
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler

from megatron_smar.runtime import finite_steps
from megatron_smar.runtime.skipped_steps import SKIPS, Skips

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


class Counting(torch.nn.Module):
    """A model whose forward pass changes a buffer, wrapped as Megatron wraps it: `buffers` is a list there."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.inner.register_buffer("seen", torch.zeros(1))
        self.buffers = []

    def forward(self, x):
        self.inner.seen += 1
        return self.inner(x)


def test_the_models_buffers_are_put_back_and_what_was_accumulated_is_forgotten():
    skips, model, calls = Skips(), Counting(), []
    skips.allowed, skips.settle, skips.discard = 1, lambda: calls.append("settle"), lambda: calls.append("discard")
    skips.begin([model])
    model(torch.ones(2))
    skips.skip(7)
    assert model.inner.seen == 0 and calls == ["settle", "discard"] and skips.done == [7] and skips.left == 0
    skips.begin([model])  # the next could not be skipped: nothing is copied
    assert calls == ["settle", "discard"] and not skips._buffers


@pytest.fixture
def one_skip(step, monkeypatch):
    monkeypatch.setattr(finite_steps, "_current_step", lambda: 3)
    monkeypatch.setattr(SKIPS, "allowed", 1)
    monkeypatch.setattr(SKIPS, "done", [])


def test_an_optimizer_skips_as_many_steps_as_allowed_and_changes_nothing_in_them(one_skip, capsys):
    good, bad = Part(torch.ones(2)), Part(torch.tensor([1.0, float("nan")]))
    chained = optimizers.ChainedOptimizer([optimizers.ChainedOptimizer([good, bad])])
    assert chained.step() == (False, None, None)
    assert SKIPS.done == [3] and not good.stepped and not bad.stepped
    assert capsys.readouterr().out.startswith("WARNING: iteration 3 is skipped (1 of --max-skipped-steps 1), since ")
    with pytest.raises(finite_steps.NotFiniteError):
        chained.step()
    assert "1 step has been skipped already (--max-skipped-steps 1)" in SKIPS.exhausted()


def test_a_step_is_not_skipped_if_a_weight_is_not_finite(one_skip, monkeypatch):
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(float("inf"))
    monkeypatch.setattr(finite_steps._STEP, "model", [model])
    with pytest.raises(finite_steps.NotFiniteError):
        optimizers.ChainedOptimizer([Part(torch.tensor([float("nan")]))]).step()
    assert SKIPS.done == []
