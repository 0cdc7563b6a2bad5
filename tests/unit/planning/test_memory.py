# SPDX-License-Identifier: Apache-2.0
"""Tests of a rank's planned memory; benchmarks/plan_accuracy.py and tests/cuda_path compare it with real models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.planning.activations import activations, attention_bytes, in_flight, local_sizes
from megatron_smar.planning.communication import shares_of_sequence
from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.memory import Buffer, Place, _buffer, buffers, held_parameters, memory, owned
from megatron_smar.planning.operations import Recomputation
from megatron_smar.planning.shape import LatentAttention, ModelShape, Parameter
from tests.unit.planning.models import BATCH, SHAPE, with_trained

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=12)


@settings(max_examples=60)
@given(SIZES, st.sampled_from([1, 2, 8, 12]), st.sampled_from([None, 3000]))
def test_a_buffers_layout_is_not_megatrons(sizes, replicas, bucket):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameters = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    config = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    theirs = DistributedOptimizer._compute_per_buffer_param_layout(parameters, bucket, replicas, config)
    import megatron_smar.planning.memory as planning

    layout = Layout(replicas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "BUCKET_SIZE", bucket or 0)
        patch.setattr(planning, "BUCKET_PER_REPLICA", 0)
        ours = _buffer(layout, False, True, sizes, bucketed=bucket is not None)
    assert list(ours.buckets) == list(theirs.bucket_indices)
    assert sorted(ours.ranges) == sorted(place[:2] for place in theirs.param_index_map.values())


@settings(max_examples=60)
@given(SIZES, st.sampled_from([1, 2, 8, 12]))
def test_replicas_do_not_own_every_element_once(sizes, replicas):
    buffer = _buffer(Layout(replicas), False, True, sizes, bucketed=False)
    assert sum(buffer.share(replicas, index) for index in range(replicas)) == sum(sizes)


LAYOUTS = (
    Layout(8, expert=8),
    Layout(8, tensor=2, pipeline=2, expert=2),
    Layout(16, pipeline=4, expert=2, expert_tensor=2),
    Layout(8, pipeline=2, chunks=2, expert=4),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_ranks_of_a_model_do_not_hold_all_of_it(layout):
    """Each parameter is on one stage; its shards on tensor-parallel ranks, experts on expert-parallel ones, add up."""
    held = [item for s in range(layout.pipeline) for chunk in held_parameters(SHAPE, layout, s) for item in chunk]
    total = 0
    for parameter, size in held:
        if parameter.expert is not None:
            total += size * layout.expert * (layout.expert_tensor if parameter.tensor_parallel else 1)
        else:
            total += size * (layout.tensor if parameter.tensor_parallel else 1)
    assert total == SHAPE.size


def test_frozen_parts_have_gradients_or_an_optimizer():
    layout = Layout(8, expert=8)
    everything, experts = (memory(shape, layout, BATCH) for shape in (SHAPE, with_trained("experts")))
    assert experts.weights < everything.weights * 1.01 and experts.gradients < everything.gradients
    assert {buffer.experts for buffer in buffers(with_trained("experts"), layout)} == {True}


def test_an_offloaded_optimizer_is_on_the_device():
    there, here = (memory(SHAPE, Layout(8, expert=8, offload=value), BATCH) for value in (True, False))
    assert there.optimizer == 0 and there.host == here.optimizer // 12 * 16 and here.host == 0


def test_stages_of_1f1b_have_other_numbers_of_passes_in_flight():
    layout = Layout(4, pipeline=4)
    assert [in_flight(layout, BATCH, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(layout, Batch(4096, 2), 0) == 2
    assert [in_flight(Layout(2, pipeline=2, chunks=2), BATCH, stage) for stage in (0, 1)] == [5, 3]


def test_what_is_recomputed_is_kept():
    plain, full = Layout(8, expert=8), Layout(8, expert=8, recomputation=Recomputation("full"))
    selective = replace(plain, recomputation=Recomputation("selective", ("moe_act", "layernorm")))
    kept = [activations(SHAPE, layout, BATCH).total for layout in (plain, selective, full)]
    assert kept[0] > kept[1] > kept[2]


def test_positions_without_a_loss_have_logits():
    few = replace(BATCH, predicted=0.1)
    layout = Layout(8, expert=8)
    assert activations(SHAPE, layout, few).total < activations(SHAPE, layout, BATCH).total


def with_latent_attention() -> ModelShape:
    """Returns the model with latents of 512 numbers and values smaller than keys, and one layer's projections."""
    heads = SHAPE.decoder.heads
    latent = LatentAttention(rank=512, query_rank=768, rotary=64, value=128)
    projections = (
        Parameter("layers.0.self_attention.linear_kv_down_proj.weight", 576 * 2048, "attention", 0, True),
        Parameter("layers.0.self_attention.linear_kv_up_proj.weight", heads * 256 * 512, "attention", 0, True),
        Parameter("layers.0.self_attention.kv_layernorm.weight", 512, "norms", 0),
    )
    decoder = replace(SHAPE.decoder, head_size=192, query_groups=heads, latent_attention=latent)
    return ModelShape(decoder, SHAPE.vision, SHAPE.trained, projections)


def test_projections_to_latents_are_sharded_although_transformer_engine_has_them_whole():
    shape, sizes, shares = with_latent_attention(), [], []
    for fused in (True, False):
        layout = Layout(4, tensor=4, fused=fused)
        sizes.append([size for _, size in held_parameters(shape, layout, 0)[0]])
        shares.append(shares_of_sequence(shape, layout, 0))
    down, up, norm = (parameter.size for parameter in shape.parameters)
    assert sizes == [[down, up // 4, norm], [down // 4, up // 4, norm]]
    assert shares == [down + norm, norm]


def test_padded_values_of_latent_attention_are_not_counted():
    """Local layers always pad them; Transformer Engine's only under packs."""
    shape, tokens = with_latent_attention(), 4096
    kept = {}
    for fused in (True, False):
        for samples in (1, 4):
            layout, batch = Layout(1, fused=fused), Batch(tokens, 1, samples=samples)
            local = local_sizes(shape, layout, batch, 1.0)
            kept[fused, samples] = attention_bytes(shape.decoder, layout, local, "fused" if fused else "local")
    padding = 2 * shape.decoder.heads * (192 - 128)  # of values, and of the output beside the trimmed one
    assert kept[True, 4] - kept[True, 1] == 2 * tokens * (padding + shape.decoder.heads * 128)
    assert kept[False, 4] == kept[False, 1]


def test_without_the_distributed_optimizer_a_rank_does_not_have_the_whole_state():
    layout = Layout(8, expert=8, distributed_optimizer=False, overlap=False)
    (first, *_) = buffers(SHAPE, layout)
    assert isinstance(first, Buffer) and owned(layout, Place(replica=3), first) == first.elements
