# SPDX-License-Identifier: Apache-2.0
"""Tests that the formulas of operations agree with torch's counter on real models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.model.parts import LANGUAGE_PARTS
from megatron_smar.monitoring.throughput import work_of
from megatron_smar.planning.operations import Recomputation, Work, operations
from megatron_smar.planning.shape import ModelShape
from tests.models import build_model, save_tower, transformer_config

IMAGE, SIDE, TOKENS_PER_TILE, VOCABULARY = 5, 32, 4, 128
ALL = frozenset(("connector", *LANGUAGE_PARTS))


def batch_of(tiles: int = 0, lengths: list[int] | None = None, real: tuple[int, ...] = (40, 25)) -> VisionLanguageBatch:
    """Makes two padded rows, or a pack of sequences, with tiles at the begin of the first."""
    generator = torch.Generator().manual_seed(1)
    rows, length = (1, sum(lengths)) if lengths else (len(real), max(real))
    ids = torch.randint(6, VOCABULARY, (rows, length), generator=generator)
    ids[0, : tiles * TOKENS_PER_TILE] = IMAGE
    padding = torch.zeros_like(ids, dtype=torch.bool)
    if not lengths:
        padding = torch.arange(length) >= torch.tensor(real)[:, None]
    return VisionLanguageBatch(
        __key__=["0", "1"],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=(ids != IMAGE).float(),
        padding_mask=padding,
        pixel_values=torch.zeros(tiles, 3, SIDE, SIDE, dtype=torch.uint8),
        lengths=torch.tensor(lengths) if lengths else None,
    )


def counted(model: Any, batch: VisionLanguageBatch) -> float:
    """Returns the operations of forward and backward that torch counts; the fused CPU kernel of attention is not."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.training.batch import prepare_batch

    groups = ProcessGroupCollection.use_mpu_process_groups()
    prepared = prepare_batch(batch, [IMAGE], TOKENS_PER_TILE, True, groups)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            **prepared.model_inputs(), labels=prepared.labels, loss_positions=prepared.loss_positions
        ).mean().backward()
    return counter.get_total_flops()


def shape_of(model: Any, trained: frozenset[str]) -> ModelShape:
    from megatron_smar.config.shape import decoder_shape, vision_shape

    tower = model.vision_model.tower.config
    return ModelShape(decoder_shape(model.config, VOCABULARY), vision_shape(tower, 2), trained)


def executed(batch: VisionLanguageBatch, tiles: int, shape: ModelShape) -> Work:
    """Returns the work that the local layers execute: the whole square of scores, and padding through the experts."""
    work = work_of(batch, tiles, whole_scores=True)[1]
    routed = work.tokens * shape.decoder.top_k * sum(shape.decoder.moe_layers)
    return replace(work, routed=routed - shape.decoder.skipped(work.tokens, work.predicted))


BATCHES = {
    "text": dict(),
    "pictures": dict(tiles=3),
    "packed": dict(tiles=2, lengths=[30, 12, 22]),
}
MODELS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "dense and shared": dict(moe_layer_freq=[0, 1, 1], moe_shared_expert_intermediate_size=64),
    "latent attention": dict(
        multi_latent_attention=True,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
        rope_type="rope",
        num_query_groups=4,
    ),
}
FROZEN = {
    "only the tower": frozenset({"vision"}),
    "stage 1": frozenset({"vision", *LANGUAGE_PARTS}),
    "only experts": frozenset({"vision", "connector", "embeddings", "attention", "norms", "dense"}),
    "nothing": frozenset(),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("freeze", FROZEN)
def test_the_formula_counts_other_operations_than_torch(single_rank, tmp_path, batch, freeze):
    if batch == "text" and freeze == "stage 1":
        pytest.skip("nothing learns from text")
    if batch == "text" and freeze == "nothing":
        pytest.skip("a trained encoder computes a blank tile where there are no pictures")
    compare(tmp_path, BATCHES[batch], FROZEN[freeze])


@pytest.mark.parametrize("model", MODELS)
def test_another_kind_of_layer_has_other_operations_than_torch_counts(single_rank, tmp_path, model):
    compare(tmp_path, BATCHES["pictures"], FROZEN["only the tower"], **MODELS[model])


@pytest.mark.parametrize(
    "flags",
    [
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
        dict(recompute_granularity="selective", recompute_modules=["moe"]),
    ],
)
def test_recomputation_has_other_operations_than_torch_counts(single_rank, tmp_path, flags):
    again = Recomputation(flags["recompute_granularity"], tuple(flags.get("recompute_modules", ())), 3)
    compare(tmp_path, BATCHES["pictures"], FROZEN["only the tower"], again, **flags)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("batch", ["pictures", "packed"])
def test_experts_that_are_skipped_count_as_operations(single_rank, tmp_path, batch, recomputed):
    freeze, again = FROZEN["only the tower"], Recomputation("selective", ("moe",)) if recomputed else None
    flags = dict(recompute_granularity="selective", recompute_modules=["moe"]) if recomputed else {}
    compare(tmp_path, BATCHES[batch], freeze, again, skips_unused=True, **flags)


def compare(folder: Any, parts: dict[str, Any], freeze: frozenset[str], again: Any = None, **config: Any) -> None:
    """Asserts that formula and counter agree within 1 %."""
    model = build_model(save_tower(folder), freeze=freeze, **config)
    batch, trained = batch_of(**parts), frozenset({"vision", *ALL}) - freeze
    shape = shape_of(model, trained)
    if config.get("multi_latent_attention"):  # the local layers pad values to the size of keys, which no formula counts
        padding = config["qk_head_dim"] + config["qk_pos_emb_head_dim"] - config["v_head_dim"]
        width = shape.decoder.score_width + shape.decoder.heads * padding
        shape = replace(shape, decoder=replace(shape.decoder, score_width=width))
    shape = replace(shape, decoder=replace(shape.decoder, skips_unused=config.get("skips_unused", False)))
    formula = operations(shape, executed(batch, parts.get("tiles", 0), shape), recomputation=again)
    assert formula.total == pytest.approx(counted(model, batch), rel=0.01)


def test_causal_scores_count_once_and_padding_not_at_all():
    needed, done = work_of(batch_of(real=(40, 25)), 0, whole_scores=True)
    assert (needed.tokens, needed.pairs) == (65, 40 * 41 / 2 + 25 * 26 / 2)
    assert (done.tokens, done.pairs) == (80, 2 * 40**2)
    needed, done = work_of(batch_of(lengths=[30, 12, 22]), 0, whole_scores=False)
    assert needed.pairs == done.pairs == sum(n * (n + 1) / 2 for n in (30, 12, 22))


def test_a_pass_without_gradients_has_a_third_of_a_trained_ones_operations():
    config = transformer_config()
    from megatron_smar.config.shape import decoder_shape
    from megatron_smar.planning.shape import VisionShape

    shape = ModelShape(decoder_shape(config, VOCABULARY), VisionShape(8, 1, 2, 16, 4, 1, 12, 1), ALL)
    work = Work(samples=1, tokens=100, pairs=5050, routed=600, predicted=80)
    assert operations(shape, work).total == pytest.approx(3 * operations(shape, work, trains=False).total)
