# SPDX-License-Identifier: Apache-2.0
"""Soft modality scores along the attention, against explicit attention matrices in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.model.score_transport import (
    append_scores,
    score_columns,
    score_dtype,
    split_scores,
    with_wider_activations,
)
from megatron_smar.routing.token_columns import split_columns
from tests.models import build_model, save_tower, transformer_config

IMAGE, LENGTH = 5, 24
SMOES = {"strategy": "smoes", "bins": 2, "scores": "attention"}


def model_inputs(lengths: list[int] | None = None) -> dict[str, Any]:
    """Returns a batch of two rows with three images and padding, or a pack of sequences of these lengths."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.training.batch import prepare_batch

    rows, length = (1, sum(lengths)) if lengths else (2, LENGTH)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 120, (rows, length), generator=generator)
    padding = torch.zeros(rows, length, dtype=torch.bool)
    for row, start in ((0, 3), (rows - 1, 12), (0, 16)):
        ids[row, start : start + 4] = IMAGE
    padding[-1, -3:] = True
    batch = VisionLanguageBatch(
        __key__=[str(row) for row in range(rows)],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=torch.ones(rows, length),
        padding_mask=padding,
        pixel_values=torch.randn(3, 3, 32, 32, generator=generator).double(),
        lengths=torch.tensor(lengths) if lengths else None,
    )
    read = prepare_batch(batch, [IMAGE], 4, True, ProcessGroupCollection.use_mpu_process_groups())
    names = ("input_ids", "position_ids", "modality_ids", "sample_ids", "vision_index", "labels", "packed_seq_params")
    return {name: getattr(read, name) for name in (*names, "pixel_values")}


class Recorded:
    """What each layer of a model received in a forward pass: queries, keys, residuals, attention's output, columns."""

    def __init__(self, model: Any) -> None:
        self.layers: list[dict[str, Any]] = []
        for layer in model.language_model.decoder.layers:
            kept: dict[str, Any] = {}
            self.layers.append(kept)
            layer.self_attention.core_attention.register_forward_pre_hook(self._keep_queries(kept))
            layer.self_attention.register_forward_hook(
                lambda module, inputs, output, kept=kept: kept.update(output=output[0].detach())
            )
            layer.register_forward_pre_hook(
                lambda module, inputs, kwargs, kept=kept: kept.update(entering=kwargs["hidden_states"].detach()),
                with_kwargs=True,
            )
            layer.mlp.register_forward_pre_hook(
                lambda module, inputs, kwargs, kept=kept: kept.update(columns=kwargs["padding_mask"]), with_kwargs=True
            )

    @staticmethod
    def _keep_queries(kept: dict[str, Any]) -> Any:
        def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept.setdefault("query", inputs[0].detach())
            kept.setdefault("key", inputs[1].detach())

        return keep

    def scores(self, layer: int) -> Tensor:
        """Returns the scores that a layer's router received, [b, s, M]."""
        found = split_columns(self.layers[layer]["columns"], 2).scores
        assert found is not None
        return found


def explicit_attention(query: Tensor, key: Tensor, lengths: list[int]) -> Tensor:
    """Returns the causal attention weights, averaged over heads, [b, s, s]; `lengths` are those of a pack."""
    query, key = (x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key))
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = torch.einsum("sbnd,tbnd->bnst", query, key) / query.shape[-1] ** 0.5
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = torch.ones(len(sequence), len(sequence)).tril().bool() & (sequence.unsqueeze(0) == sequence.unsqueeze(1))
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).mean(1)


@pytest.fixture
def tower(tmp_path) -> str:
    return save_tower(tmp_path)


@pytest.mark.parametrize("lengths", [None, [10, 9, 5]], ids=["rows", "pack"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_each_router_gets_the_scores_of_the_papers_recursion_with_explicit_attention(
    single_rank, tower, lengths, recompute
):
    whole = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model = build_model(tower, routing=SMOES, params_dtype=torch.float64, **(whole if recompute else {})).double()
    inputs, recorded = model_inputs(lengths), Recorded(model)
    model(**inputs).sum().backward()
    is_token = (inputs["modality_ids"] >= 0).unsqueeze(-1)
    expected = torch.nn.functional.one_hot(inputs["modality_ids"].clamp(min=0).long(), 2).double() * is_token
    assert len(recorded.layers) == 3
    for number, layer in enumerate(recorded.layers):
        torch.testing.assert_close(recorded.scores(number), expected, atol=1e-12, rtol=0)
        weights = explicit_attention(layer["query"], layer["key"], lengths or [LENGTH])
        own, other = (x.transpose(0, 1).norm(dim=-1, keepdim=True) for x in (layer["entering"], layer["output"]))
        expected = (other * (weights @ expected) + own * expected) / (own + other) * is_token
    soft = recorded.scores(2)[is_token.squeeze(-1)]
    assert ((soft > 0.02) & (soft < 0.98)).any(), "the scores stayed hard labels"
    torch.testing.assert_close(soft.sum(-1), torch.ones(len(soft)).double())


@pytest.mark.parametrize("modules", [["core_attn"], ["moe"], ["core_attn", "moe"]])
def test_selective_recomputation_changes_neither_losses_nor_gradients(single_rank, tower, modules):
    results = []
    for more in ({}, dict(recompute_granularity="selective", recompute_modules=modules)):
        torch.manual_seed(0)
        routing = SMOES | {"information_coeff": 0.5}
        model = build_model(tower, routing=routing, params_dtype=torch.float64, **more).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.language_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        reports: list[Any] = []
        for layer in model.language_model.decoder.layers:
            layer.mlp.router.observers.append(reports.append)
        model.step.samples = 2
        model(**model_inputs()).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(({report.layer: dict(report.losses) for report in reports}, gradients))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-9)


def test_dropout_of_the_attention_reaches_the_values_but_not_the_scores(single_rank, tower):
    scores = []
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        model = build_model(tower, routing=SMOES, params_dtype=torch.float64, attention_dropout=dropout).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.language_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        layer = model.language_model.decoder.layers[0]
        kept: list[Tensor] = []
        layer.self_attention.register_forward_hook(
            lambda module, inputs, output, layer=layer, kept=kept: kept.append(layer._attended)
        )
        model(**model_inputs())
        scores.append(kept[0])
        assert layer.self_attention.core_attention.training
    torch.testing.assert_close(scores[0], scores[1])


def test_evaluation_computes_no_scores(single_rank, tower):
    model = build_model(tower, routing=SMOES).eval()
    inputs = model_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    recorded = Recorded(model)
    with torch.no_grad():
        model(**inputs)
    assert all(layer["columns"].dtype == torch.bool for layer in recorded.layers)


def test_training_without_sample_numbers_is_refused(single_rank, tower):
    model = build_model(tower, routing=SMOES)
    inputs = model_inputs() | {"sample_ids": None}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with pytest.raises(ValueError, match="sample_ids is missing"):
        model(**inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("modalities", [2, 3])
def test_scores_reach_the_next_stage_bit_for_bit_beside_activations_of_any_precision(dtype, modalities):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(7, 2, modalities, generator=generator, dtype=torch.float64).to(score_dtype(dtype))
    scores[0, 0, 0], scores[1, 1, 1] = 1e-38, 1 - 2**-24  # no bf16 number is near the second
    activations = torch.randn(7, 2, 6, generator=generator).to(dtype).requires_grad_()
    sent = append_scores(activations, scores)
    assert sent.shape == (7, 2, 6 + score_columns(modalities, dtype)) and sent.dtype == dtype
    received = sent.detach().requires_grad_()
    arrived, found = split_scores(received, 6)
    assert torch.equal(found, scores) and found.dtype == scores.dtype
    assert torch.equal(arrived, activations)
    arrived.backward(torch.ones_like(arrived))
    assert received.grad[..., :6].eq(1).all() and received.grad[..., 6:].eq(0).all()
    sent.backward(received.grad)
    assert activations.grad.eq(1).all()


def test_the_schedules_config_is_wider_and_shares_every_other_setting(single_rank):
    config = transformer_config()
    wide = with_wider_activations(config, 4)
    assert (config.hidden_size, wide.hidden_size) == (48, 52)
    assert isinstance(wide, type(config)) and wide.num_layers == config.num_layers
    wide.grad_scale_func = config.finalize_model_grads_func = abs
    assert config.grad_scale_func is abs and wide.finalize_model_grads_func is abs
