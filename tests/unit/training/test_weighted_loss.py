# SPDX-License-Identifier: Apache-2.0
"""--loss-weighting in Megatron's schedule, against sum(w * loss) / sum(w) written out in float64, on a real model."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.models import build_model, save_tower

IMAGE, TILE_TOKENS, LENGTH = 5, 4, 48
POWERS = {"token": 0.0, "sample": 1.0, "sqrt": 0.5}
NAMES = ("input_ids", "position_ids", "modality_ids", "sample_ids", "vision_index", "pixel_values", "packed_seq_params")


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def model(single_rank, tower):
    from megatron.core.enums import ModelType

    torch.manual_seed(2)
    model = build_model(tower).double().train()
    model.model_type = ModelType.encoder_or_decoder  # as Megatron's get_model sets it
    return model


@pytest.fixture
def three_micro_batches():
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(0, None, 3, 1, 1)
    yield
    calculator.destroy_num_microbatches_calculator()


def make_batches() -> list:
    """Returns a micro-batch of rows, a pack, and a micro-batch of which only one of three rows has loss tokens."""
    from megatron_smar.data.batch import VisionLanguageBatch

    generator, batches = torch.Generator().manual_seed(4), []
    for numbers, lengths in (((3, 25), None), (((7, 1, 12),), [14, 10, 16, 8]), ((0, 9, 0), None)):
        ids, labels = (torch.randint(6, 128, (len(numbers), LENGTH), generator=generator) for _ in range(2))
        ids[0, 1 : 1 + TILE_TOKENS] = IMAGE
        mask = torch.zeros(ids.shape)
        starts = [0] * len(numbers) if lengths is None else np.cumsum([0, *lengths])
        for row, of_row in enumerate(numbers):
            for start, number in zip(starts if lengths else [0], of_row if lengths else [of_row], strict=False):
                mask[row, start : start + number] = 1
        batches.append(
            VisionLanguageBatch(
                __key__=[str(row) for row in range(len(ids))],
                __restore_key__=(),
                input_ids=ids,
                labels=labels,
                loss_mask=mask,
                padding_mask=torch.zeros_like(ids, dtype=torch.bool),
                pixel_values=torch.randn(1, 3, 32, 32, generator=generator),
                lengths=None if lengths is None else torch.tensor(lengths),
            )
        )
    return batches


def model_inputs(batch):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.training.batch import prepare_batch

    return prepare_batch(batch, [IMAGE], TILE_TOKENS, True, ProcessGroupCollection.use_mpu_process_groups())


def reference(model, power: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns sum(w * loss) / sum(w) in float64 and its gradients, from the logits, one sample after another."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for batch in make_batches():
        inputs = vars(model_inputs(batch))
        logits = model(**{name: inputs[name] for name in NAMES})
        losses = -logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
        places = [(row, slice(None)) for row in range(len(losses))]
        if batch.lengths is not None:
            ends = np.cumsum([0, *batch.lengths.tolist()])
            places = [(0, slice(*pair)) for pair in pairwise(ends)]
        for place in places:
            counted = losses[place][batch.loss_mask[place] == 1]
            if len(counted):
                total = total + counted.sum() / len(counted) ** power
                weight += len(counted) ** (1 - power)
    loss = total / weight
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def scheduled(model, batches: list, weighting: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs the micro-batches in Megatron's schedule; returns what Megatron logs of the loss, and the gradients."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.training.batch import read_ahead
    from megatron_smar.training.loss import LM_LOSS, weighted_lm_loss

    def forward_step(iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        inputs = model_inputs(next(iterator))
        output = model(**{name: getattr(inputs, name) for name in (*NAMES, "labels")})
        weights = inputs.loss_weights
        return output, partial(weighted_lm_loss, weights, {}, False, step_weight=inputs.step_weight, ranks=1)

    model.zero_grad()
    logged = forward_backward_no_pipelining(
        forward_step_func=forward_step,
        data_iterator=read_ahead(iter(batches), dist.group.WORLD, False, weighting),
        model=model,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    sums = torch.stack([of_batch[LM_LOSS] for of_batch in logged]).sum(dim=0)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums, gradients


@pytest.mark.parametrize("weighting", POWERS)
def test_the_loss_and_every_gradient_are_those_of_the_weighted_mean_over_the_step(
    model, three_micro_batches, weighting
):
    loss, expected = reference(model, POWERS[weighting])
    sums, found = scheduled(model, make_batches(), weighting)
    assert float(sums[0] / sums[1]) == pytest.approx(float(loss), rel=1e-6)
    assert set(found) >= set(expected) and len(expected) > 20
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        error = float((found[name] - gradient).abs().max())
        assert error <= 5e-6 * largest + 1e-9, f"{name}: off by {error:.3g} of {largest:.3g}"
    assert expected["connector.linear_1.weight"].abs().max() > 1e-6


def test_the_three_weightings_are_different_losses(model, three_micro_batches):
    """If this failed, the test above would compare equal means."""
    losses = [float(reference(model, power)[0]) for power in POWERS.values()]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4 * losses[0]


def test_a_step_without_loss_tokens_has_gradients_of_zero(model, three_micro_batches):
    batches = make_batches()
    for batch in batches:
        batch.loss_mask.zero_()
    sums, gradients = scheduled(model, batches, "sqrt")
    assert sums.tolist() == [0, 0]
    assert gradients and all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_training_refuses_a_batch_without_weights_and_validation_is_the_mean_over_tokens(
    single_rank, tower, monkeypatch
):
    from megatron_smar.training import providers

    args = SimpleNamespace(curr_iteration=0, check_for_nan_in_loss_and_grad=False, calculate_per_token_loss=False)
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(providers, "get_args", lambda: args)
    monkeypatch.setattr(providers, "get_timers", lambda: lambda *_, **__: timer)
    monkeypatch.setattr(providers, "get_run_config", lambda: SimpleNamespace(loss_weighting="sqrt"))
    model = build_model(tower).train()
    forward_step = providers.make_forward_step([IMAGE], TILE_TOKENS)
    with pytest.raises(RuntimeError, match="--loss-weighting sqrt needs the sum of a step's weights"):
        forward_step(iter(make_batches()), model)
    first = make_batches()[0]
    output, loss_function = forward_step(iter([first]), model.eval())  # validation: the mean over tokens
    total, number, logged = loss_function(output)
    assert int(number) == int(first.loss_mask.sum()) == 28
    assert logged["lm loss"].tolist() == [pytest.approx(float((output * first.loss_mask).sum()), rel=1e-6), 28]
    assert float(total) == float(logged["lm loss"][0])
