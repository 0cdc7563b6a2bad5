# SPDX-License-Identifier: Apache-2.0
"""SMoES: losses of one layer against the paper's equations in NumPy, its state, and what its settings refuse."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_smar.routing.strategies.smoes import BALANCE_LOSS, CROSSING, INFORMATION_LOSS, OBJECTIVE, SmoesConfig
from tests.models import router_of

POSITIONS, ROWS, EXPERTS, TOP_K = 9, 3, 6, 2


def settings(**changes) -> SmoesConfig:
    return SmoesConfig(**(dict(scores="hard", bins=3, information_coeff=0.7, balance_coeff=0.3, decay=0.5) | changes))


def inputs(seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a router's input [s, b, h] and modality mask: a mixed row, a row of text with padding, a mixed row."""
    hidden = torch.randn(POSITIONS, ROWS, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.zeros(POSITIONS, ROWS, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    mask[2:6, 0] = mask[5:, 2] = torch.tensor([False, True])
    mask[6:, 1] = False
    return hidden, mask


def router(config: SmoesConfig):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    made = router_of(config, num_moe_experts=EXPERTS, moe_router_topk=TOP_K)
    made.weight.data = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(8)).double()
    return made


def run(made, hidden, mask, samples=None, scores=None):
    """Runs one micro-batch and returns the router's report."""
    reports: list = []
    made.observers[:] = [reports.append]
    made.sample_ids = torch.arange(ROWS).expand(POSITIONS, ROWS) if samples is None else samples
    made.step.samples = int(made.sample_ids.max()) + 1
    made.scores = scores
    output = made.finish(made(hidden, mask)[0])
    (output * 0).sum().backward()
    return reports[0]


def reference(weight, hidden, mask, scores, samples, bins, chosen, config) -> tuple[float, float]:
    """The paper's two losses of a layer, sample by sample and token by token."""
    hidden, mask, scores = (x.reshape(-1, x.shape[-1]).double().numpy() for x in (hidden, mask, scores))
    samples, is_token = samples.reshape(-1).numpy(), mask.any(1)
    logits = hidden @ weight.detach().numpy().T
    gates = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    size = EXPERTS // config.bins
    information = []
    for sample in sorted(set(samples[is_token])):
        tokens = np.flatnonzero((samples == sample) & is_token)
        means = np.zeros((2, config.bins))
        for m, k in np.ndindex(2, config.bins):
            mass = scores[tokens, m].sum()
            own = [gates[j, e] * scores[j, m] for j in tokens for e in range(EXPERTS) if bins[e] == k]
            means[m, k] = sum(own) / (size * mass) if mass > 0 else 0
        joint = means / means.sum()
        information.append(
            sum(
                joint[m, k] * np.log(joint[m, k] / (joint[m].sum() * joint[:, k].sum()))
                for m, k in np.ndindex(*joint.shape)
                if joint[m, k] > 0
            )
        )
    frequencies = chosen.numpy()[is_token].sum(0) / (TOP_K * is_token.sum())
    balance = size * (frequencies * gates[is_token].mean(0)).sum()
    return -float(np.mean(information)), float(balance)


def test_both_losses_of_a_layer_are_the_papers_with_hard_scores(single_rank):
    config, (hidden, mask) = settings(), inputs()
    made = router(config)
    report = run(made, hidden, mask)
    samples = torch.arange(ROWS).expand(POSITIONS, ROWS)
    _, chosen = made(hidden, mask)
    expected = reference(made.weight, hidden, mask, mask, samples, [0, 0, 1, 1, 2, 2], chosen, config)
    assert float(report.losses[INFORMATION_LOSS]) == pytest.approx(expected[0], rel=1e-6)
    assert float(report.losses[BALANCE_LOSS]) == pytest.approx(expected[1], rel=1e-6)
    assert float(report.losses[INFORMATION_LOSS]) < -1e-3
    objective = report.measures[OBJECTIVE]
    assert (float(objective.value), float(objective.weight)) == (-float(report.losses[INFORMATION_LOSS]), ROWS)
    bins_of_token = (chosen.view(-1, 3, 2).any(-1)).sum(-1)[mask.any(-1).flatten()]
    crossing = report.measures[CROSSING]
    assert float(crossing.value) == pytest.approx(float((bins_of_token > 1).double().mean()))
    assert float(crossing.weight) == int(mask.sum())


def test_the_gradient_is_that_of_the_two_losses_with_their_coefficients(single_rank):
    config, (hidden, mask) = settings(), inputs()
    made = router(config)
    run(made, hidden, mask)
    samples = torch.arange(ROWS).expand(POSITIONS, ROWS)
    _, chosen = made(hidden, mask)
    bins = [0, 0, 1, 1, 2, 2]
    step = 1e-5
    for place in ((0, 0), (3, 7), (5, 20)):
        values = []
        for sign in (1, -1):
            weight = made.weight.detach().clone()
            weight[place] += sign * step
            losses = reference(weight, hidden, mask, mask, samples, bins, chosen, config)
            values.append(config.information_coeff * losses[0] + config.balance_coeff * losses[1])
        assert float(made.weight.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-4, abs=1e-8)


def test_soft_scores_by_attention_and_the_sequences_of_a_pack_are_used_as_given(single_rank):
    config, (hidden, mask) = settings(scores="attention"), inputs()
    scores = torch.softmax(torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).double(), -1)
    scores = scores * mask.any(-1, keepdim=True)
    samples = torch.arange(POSITIONS * ROWS).view(POSITIONS, ROWS) % 5
    made = router(config)
    report = run(made, hidden, mask, samples, scores)
    _, chosen = made(hidden, mask)
    expected = reference(made.weight, hidden, mask, scores, samples, [0, 0, 1, 1, 2, 2], chosen, config)
    assert float(report.losses[INFORMATION_LOSS]) == pytest.approx(expected[0], rel=1e-6)


def test_a_larger_number_of_samples_than_the_micro_batch_has_changes_nothing(single_rank):
    hidden, mask = inputs()
    losses = []
    for number in (ROWS, ROWS + 4):
        made = router(settings())
        reports: list = []
        made.observers[:] = [reports.append]
        made.sample_ids, made.step.samples = torch.arange(ROWS).expand(POSITIONS, ROWS), number
        made.finish(made(hidden, mask)[0])
        losses.append(reports[0].losses)
    torch.testing.assert_close(losses[0], losses[1])


def test_loads_and_bins_follow_the_counts_of_whole_steps_and_fixed_bins_do_not(single_rank):
    _, mask = inputs()
    for fixed, interval in ((False, 1), (False, 2), (True, 1)):
        made = router(settings(fixed_bins=fixed, rebin_interval=interval))
        loads, counted = torch.zeros(2, EXPERTS).double(), []
        for step in range(4):
            made.step.iteration = step
            for seed in (step, step + 10):
                counted.append(run(made, inputs(seed)[0], mask).statistics.counts)
            made.step.settle()
            loads = 0.5 * loads + 0.5 * (counted[-1] + counted[-2])
            torch.testing.assert_close(made.strategy.loads.double(), loads)
            share = (loads[0] / loads.sum(0)).tolist()
            if fixed or step + 1 < interval:
                assert made.strategy.bins.tolist() == [0, 0, 1, 1, 2, 2]
            elif (step + 1) % interval == 0:
                order = sorted(range(EXPERTS), key=lambda expert: (share[expert], expert))
                assert [int(made.strategy.bins[expert]) for expert in order] == [0, 0, 1, 1, 2, 2]


def test_gaussian_scores_are_hard_until_every_modality_was_seen_and_then_those_of_the_last_step(single_rank):
    from megatron_smar.routing.soft_scores import gaussian_modality_scores

    hidden, mask = inputs()
    config = settings(scores="gaussian")
    made = router(config)
    report = run(made, hidden, mask)
    samples = torch.arange(ROWS).expand(POSITIONS, ROWS)
    _, chosen = made(hidden, mask)
    expected = reference(made.weight, hidden, mask, mask, samples, [0, 0, 1, 1, 2, 2], chosen, config)
    assert float(report.losses[INFORMATION_LOSS]) == pytest.approx(expected[0], rel=1e-6)
    made.step.iteration = 1
    report = run(made, hidden, mask)
    text, vision = hidden[mask[..., 0]], hidden[mask[..., 1]]
    mean, variance = (
        torch.stack([text.mean(0), vision.mean(0)]),
        torch.stack([text.var(0, False), vision.var(0, False)]),
    )
    torch.testing.assert_close(made.strategy.mean, mean)
    scores = gaussian_modality_scores(hidden.flatten(0, 1), mean, variance).view(mask.shape) * mask.any(
        -1, keepdim=True
    )
    bins = made.strategy.bins.tolist()
    present = mask.any(0).to(scores.dtype)  # a sample of text alone has no mass of vision, and so no information
    expected = reference(made.weight, hidden, mask, scores * present, samples, bins, chosen, config)
    assert present.prod(1).tolist() == [1, 0, 1]
    assert float(report.losses[INFORMATION_LOSS]) == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize(("objective", "acts"), [("information", True), ("kl", True), ("none", False)])
def test_the_objective_of_an_ablation_acts_or_is_only_reported(single_rank, objective, acts):
    hidden, mask = inputs()
    made = router(settings(objective=objective, balance_coeff=0.0))
    report = run(made, hidden, mask)
    assert float(report.losses[INFORMATION_LOSS]) < 0
    gradient = made.weight.grad
    assert (gradient is not None and bool(gradient.abs().max() > 1e-6)) is acts


def test_a_batch_of_one_modality_gives_no_information_and_finite_gradients(single_rank):
    hidden, mask = inputs()
    mask[..., 0], mask[..., 1] = mask.any(-1), False
    made = router(settings())
    report = run(made, hidden, mask)
    assert float(report.losses[INFORMATION_LOSS]) == pytest.approx(0, abs=1e-9)
    assert made.weight.grad.isfinite().all()


def flags(**changes) -> Namespace:
    defaults = dict(num_experts=8, expert_model_parallel_size=4, mtp_num_layers=None, fp8=None, fp4=None)
    return Namespace(**(defaults | dict(recompute_modules=None, smoes_bins=None) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"bins": 1},
            r"--smoes-bins is 1 \(default: the expert-parallel size\), and with fewer than 2 bins the loss is always 0",
        ),
        ({"rebin_interval": 0}, "--smoes-rebin-interval is 0"),
        ({"information_coeff": -1.0}, "--smoes-information-coeff is -1.0"),
        ({"balance_coeff": -0.5}, "--smoes-balance-coeff is -0.5"),
        ({"decay": 1.0}, "--smoes-decay is 1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        SmoesConfig(**changes)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({"bins": 3}, {}, "--smoes-bins 3 does not divide --num-experts 8"),
        ({"bins": 2}, {"mtp_num_layers": 1}, "no scores for multi-token prediction"),
        ({"bins": 2}, {"experimental_attention_variant": "dsa"}, "needs softmax attention"),
        ({"bins": 2}, {"fp8": "e4m3", "recompute_modules": ["moe"]}, "--recompute-modules moe with FP8"),
    ],
)
def test_settings_that_do_not_fit_the_other_flags_are_refused(config, changes, said):
    with pytest.raises(ValueError, match=said):
        SmoesConfig(**config).check(flags(**changes), [1, 2])


def test_the_number_of_bins_is_that_of_the_resumed_run_or_else_the_expert_parallel_size():
    assert SmoesConfig.default_flags(flags(), None) == {"--smoes-bins": 4}
    assert SmoesConfig.default_flags(flags(), Namespace(smoes_bins=2)) == {"--smoes-bins": 2}
    assert SmoesConfig.default_flags(flags(smoes_bins=8), Namespace(smoes_bins=2)) == {}
    assert SmoesConfig.default_flags(flags(), Namespace()) == {"--smoes-bins": 4}, "the stage before had none"
