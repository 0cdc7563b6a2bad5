# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5-VL's routing, compared with a reference in NumPy over several steps, token by token."""

from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_smar.checkpoint.stored_flags import strategy_flags
from megatron_smar.routing.strategies import stored_strategy
from megatron_smar.routing.strategies.balance import BALANCE_LOSS
from megatron_smar.routing.strategies.ernie import ORTHOGONAL_LOSS, ErnieConfig
from megatron_smar.routing.strategies.hard import HardConfig
from tests.models import route, router_of
from tests.unit.routing.reference import softmax
from tests.unit.routing.strategies.routed import IDS, batch, logits_of, run, set_weight
from tests.unit.routing.strategies.test_modality_balance import reference as balance

OWN = {0: [1, 3, 6], 1: [0, 2, 4, 5, 7]}
EXPERTS = ("text=1,3,6", "vision=0,2,4,5,7")
RATE, K, E = 0.05, 2, 8
CONFIG = ErnieConfig(EXPERTS, balance_coeff=("text=0.3", "vision=0.05"), orthogonal_coeff=0.25, bias_rate=RATE)
SCORES = {
    "softmax after top-k": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
}


def make_router(config=CONFIG, **settings):
    router = router_of(config, num_moe_experts=E, **settings)
    set_weight(router)
    return router


class Reference:
    """The routing of one layer: bias and loads of each modality's experts."""

    def __init__(self, kind: str, rate: float = RATE) -> None:
        self.kind, self.rate = kind, rate
        self.bias, self.load = np.zeros((2, E)), np.zeros((2, E))

    def route(self, router, inputs, ids) -> np.ndarray:
        """Returns the weights [s, b, E] of a micro-batch, and counts the loads."""
        weights = np.zeros((*ids.shape, E))
        for modality, own in OWN.items():
            _, logits = logits_of(router, inputs, ids, modality)
            rows = np.zeros((len(logits), E))
            for row, z in zip(rows, logits[:, own], strict=True):
                scores = 1 / (1 + np.exp(-z)) if self.kind == "sigmoid" else softmax(z)
                chosen = np.argsort(-(scores + self.bias[modality, own]))[:K]
                kept = softmax(z[chosen]) if self.kind == "softmax after top-k" else scores[chosen]
                row[np.array(own)[chosen]] = kept / kept.sum() if self.kind == "sigmoid" else kept
            weights[ids == modality] = rows
            self.load[modality] += (rows > 0).sum(0)
        return weights

    def end_step(self) -> None:
        for modality, own in OWN.items():
            load = self.load[modality, own]
            self.bias[modality, own] += self.rate * np.sign(load.mean() - load)
        self.load[:] = 0


@pytest.mark.parametrize("kind", SCORES)
def test_choice_weights_or_bias_differ_from_the_reference_over_steps(single_rank, kind):
    """Four steps of two micro-batches, each run twice as under recomputation, then evaluation."""
    router, reference = make_router(**SCORES[kind]), Reference(kind)
    free = Reference(kind)
    changed = 0
    for step in range(4):
        router.step.iteration = step
        for seed in (step, step + 10):
            inputs, mask = batch(seed=seed)
            with torch.no_grad():
                first = router(inputs, mask)[1]
            probs, chosen = router(inputs, mask)
            assert torch.equal(first, chosen), "the two passes of a recomputed layer choose the same experts"
            router.finish(probs)
            expected = reference.route(router, inputs, IDS)
            real = mask.any(-1)
            found = probs.view(*IDS.shape, E).detach().numpy()
            np.testing.assert_allclose(found[real], expected[real], rtol=1e-5, atol=1e-7)
            changed += (expected != free.route(router, inputs, IDS)).any(-1).sum()
        reference.end_step()
        free.load[:] = 0
    router.eval()
    router.step.settle()  # as the model does before it is saved
    inputs, mask = batch(seed=99)
    before = router.strategy.bias.clone()
    np.testing.assert_allclose(before.numpy(), reference.bias, atol=1e-12)
    router(inputs, mask)
    assert torch.equal(router.strategy.bias, before), "evaluation changes nothing"
    assert changed > 3, "the bias changes no choice, so the test shows nothing"


@pytest.mark.parametrize("kind", SCORES)
def test_the_bias_has_an_effect_on_the_weights_or_their_gradient(single_rank, kind):
    router = make_router(**SCORES[kind])
    router.strategy.bias = torch.linspace(-1, 1, 2 * E, dtype=torch.float64).view(2, E) * router.strategy.own
    inputs, mask = batch()
    inputs.requires_grad_()
    probs, chosen, _ = route(router, inputs, mask)
    (found,) = torch.autograd.grad((probs * torch.arange(E)).sum(), inputs)
    logits = (inputs @ router.weight.T).masked_fill(mask.to(torch.float64) @ router.strategy.own.double() == 0, -1e9)
    kept = logits.masked_fill(~chosen, -torch.inf)
    expected = {
        "softmax after top-k": lambda: kept.softmax(-1),
        "softmax before top-k": lambda: logits.softmax(-1) * chosen,
        "sigmoid": lambda: F.normalize(logits.sigmoid() * chosen, p=1, dim=-1),
    }[kind]()
    real = mask.any(-1)
    torch.testing.assert_close(probs[real], expected[real], rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad((expected * torch.arange(E))[real].sum(), inputs)
    torch.testing.assert_close(found[real], gradient[real], rtol=1e-4, atol=1e-6)


def orthogonal(weight: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the router orthogonal loss and its gradient."""
    loss, gradient = 0.0, np.zeros_like(weight)
    for own in OWN.values():
        rows = weight[own]
        lengths = np.sqrt((rows**2).sum(1, keepdims=True))
        unit = rows / lengths
        off = unit @ unit.T - np.eye(len(own))
        loss += (off**2).mean()
        to_unit = 4 * off @ unit / len(own) ** 2
        gradient[own] = (to_unit - unit * (unit * to_unit).sum(1, keepdims=True)) / lengths
    return loss, gradient


def test_losses_or_gradients_differ_from_the_equations(single_rank):
    router = make_router()
    router.strategy.bias = torch.linspace(-1, 1, 2 * E, dtype=torch.float64).view(2, E) * router.strategy.own
    inputs, mask = batch()
    losses, gradient = run(router, inputs, mask)
    balanced, of_balance = balance(router, inputs, IDS, {0: 0.3, 1: 0.05}, experts=OWN)
    other, of_weights = orthogonal(router.weight.detach().numpy())
    assert losses == pytest.approx({BALANCE_LOSS: balanced, ORTHOGONAL_LOSS: other}, rel=1e-12)
    np.testing.assert_allclose(gradient.numpy(), of_balance + 0.25 * of_weights, rtol=1e-9, atol=1e-13)


def test_without_bias_and_losses_it_is_not_hard_routing(single_rank):
    router, hard = make_router(ErnieConfig(EXPERTS, bias_rate=0.0)), make_router(HardConfig(EXPERTS))
    for step in range(3):
        router.step.iteration = step
        inputs, mask = batch(seed=step)
        probs, chosen, _ = route(router, inputs, mask)
        expected, wanted, _ = route(hard, inputs, mask)
        assert torch.equal(probs, expected) and torch.equal(chosen, wanted)


def train(router, steps) -> None:
    for step in steps:
        router.step.iteration = step
        inputs, mask = batch(seed=step)
        router.finish(router(inputs, mask)[0])


def test_a_resumed_run_has_another_bias(single_rank):
    undisturbed, interrupted, resumed = make_router(), make_router(), make_router()
    train(undisturbed, range(5))
    train(interrupted, range(2))
    interrupted.step.settle()  # as the model does before it is saved
    resumed.load_state_dict(interrupted.state_dict())
    train(resumed, range(2, 5))
    assert torch.equal(resumed.strategy.bias, undisturbed.strategy.bias) and resumed.strategy.bias.any()
    assert torch.equal(resumed.strategy.load, undisturbed.strategy.load)
    assert not torch.equal(interrupted.strategy.bias, undisturbed.strategy.bias)


def test_a_frozen_routers_bias_moves(single_rank):
    router = make_router()
    train(router, range(2))
    router.step.settle()
    before = router.strategy.bias.clone()
    router.weight.requires_grad_(False)
    for step in (2, 3):
        router.step.iteration = step
        inputs, mask = batch(seed=step)
        router.finish(router(inputs.requires_grad_(), mask)[0])
    router.step.settle()
    assert torch.equal(router.strategy.bias, before) and before.any()


def test_a_modality_without_tokens_moves_its_bias(single_rank):
    router = make_router()
    ids = np.zeros((4, 2), int)
    for step in range(3):
        router.step.iteration = step
        inputs, mask = batch(ids, seed=step)
        router.finish(router(inputs, mask)[0])
    assert router.strategy.bias[0].any() and not router.strategy.bias[1].any()
    assert not router.strategy.bias[0, OWN[1]].any(), "only its own experts have a bias"


def test_an_export_leaves_the_bias_out_or_evaluation_routes_without_it():
    from megatron_smar.conversion.exporter import ConversionError, allowed_experts

    flags = {"ernie_experts": list(EXPERTS), "ernie_bias_rate": 0.02, "ernie_orthogonal_coeff": 3.0}
    saved = Namespace(modality_routing="ernie", **flags)
    with pytest.raises(ConversionError, match="--modality-routing ernie, which no export can compute"):
        allowed_experts(saved)
    of_inference = {"ernie_experts": EXPERTS, "ernie_bias_rate": 0.02}
    assert strategy_flags(saved) == {"modality_routing": "ernie"} | of_inference
    assert stored_strategy(saved) == ErnieConfig(EXPERTS, bias_rate=0.02)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bias_rate": -1.0}, "--ernie-bias-rate is -1.0; it must be 0 or more"),
        ({"orthogonal_coeff": float("nan")}, "--ernie-orthogonal-coeff is nan"),
        ({"balance_coeff": ("text=-1",)}, "--ernie-balance-coeff text=-1 is not a coefficient"),
        ({"experts": ("text=0-7",)}, "--ernie-experts text=0-7 must name each of text, vision once"),
    ],
)
def test_settings_without_a_meaning_are_accepted(settings, said):
    args = SimpleNamespace(
        image_modalities=["vision"],
        moe_router_load_balancing_type=["none"],
        moe_aux_loss_coeff=0.0,
        moe_router_enable_expert_bias=False,
    )
    ErnieConfig().check(args, [1])
    with pytest.raises(ValueError, match=said):
        config = ErnieConfig(**settings)
        config.check(args, [1])
        config.allowed(1, ("text", "vision"), 8)
    args.moe_router_enable_expert_bias = True
    with pytest.raises(ValueError, match="--moe-router-enable-expert-bias compares loads across modalities"):
        ErnieConfig().check(args, [1])
