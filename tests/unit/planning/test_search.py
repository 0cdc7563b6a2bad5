# SPDX-License-Identifier: Apache-2.0
"""Tests of the layouts that are planned, their order and reasons."""

from dataclasses import replace

import pytest

from megatron_smar.planning.cluster import GIB, PRESETS, Cluster
from megatron_smar.planning.communication import communication
from megatron_smar.planning.duration import seconds, timed_batch
from megatron_smar.planning.layout import Batch, Layout, legal_layouts
from megatron_smar.planning.search import Request, evaluate, search
from tests.unit.planning.models import BATCH, SHAPE

H100 = PRESETS["h100"]


def request(**changes: object) -> Request:
    return replace(Request(SHAPE, BATCH, H100, 8), **changes)  # type: ignore[arg-type]


def test_a_layout_is_proposed_that_megatron_refuses():
    layouts = list(legal_layouts(SHAPE, BATCH, 8))
    assert layouts and all(layout.problem(SHAPE, BATCH) is None for layout in layouts)
    assert all(layout.data >= 1 and layout.expert_replicas >= 1 for layout in layouts)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(8, tensor=3), "TP x CP x PP does not divide the GPUs"),
        (Layout(8, expert=16), "ETP x EP x PP does not divide the GPUs"),
        (Layout(8, pipeline=8), "does not divide the 4 layers"),
        (Layout(16, tensor=16), "TP does not divide the 8 key-value heads"),
        (Layout(8, micro_batch=3), "does not divide the batch of 64"),
        (Layout(8, chunks=2), "chunks need PP above 1"),
        (Layout(8, distributed_optimizer=False), "overlap needs the distributed optimizer"),
    ],
)
def test_an_impossible_layout_is_not_refused_with_its_reason(layout, words):
    assert words in (layout.problem(SHAPE, BATCH) or "")


def test_experts_with_biases_are_sharded_by_tensor_parallelism():
    biased = replace(SHAPE, decoder=replace(SHAPE.decoder, has_biases=True))
    layout = Layout(8, tensor=2, expert=2, expert_tensor=2)
    assert layout.problem(SHAPE, BATCH) is None
    assert layout.problem(biased, BATCH) == "experts with biases need ETP 1"
    assert {found.expert_tensor for found in legal_layouts(biased, BATCH, 8)} == {1}


def test_the_plans_are_not_in_the_order_of_their_time_or_do_not_fit():
    plans = search(request(), best=6)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    assert all(plan.fits and plan.memory.device <= H100.memory * GIB for plan in plans)
    assert plans[0].reason.startswith("the fastest") and all(plan.reason for plan in plans)


def test_where_nothing_fits_the_smallest_layouts_are_not_shown():
    plans = search(request(cluster=replace(H100, memory=3.0)), best=3)
    assert not any(plan.fits for plan in plans) and {plan.reason for plan in plans} == {"does not fit"}
    sizes = [plan.memory.device for plan in plans]
    assert sizes == sorted(sizes)


def test_only_wanted_layouts_are_ignored():
    plans = search(request(), best=3, wanted=lambda layout: layout.expert == 8)
    assert {plan.layout.expert for plan in plans} == {8}
    with pytest.raises(ValueError, match="no layout of 8 GPUs is possible"):
        search(request(), wanted=lambda layout: False)


def test_padding_is_computed_without_pipeline_parallelism_or_not_with_it():
    assert timed_batch(Layout(8), BATCH).sequence == 2048
    assert timed_batch(Layout(8, pipeline=2), BATCH).sequence == 4096
    full = replace(BATCH, filled=1.0)
    assert (
        evaluate(request(), Layout(8, expert=8)).seconds
        < 0.7 * evaluate(request(batch=full), Layout(8, expert=8)).seconds
    )


def test_pictures_and_slow_networks_cost_nothing():
    layout, plain = Layout(16, pipeline=2, expert=8), Batch(4096, 64)
    there = request(gpus=16)
    assert evaluate(there, layout).duration.vision > evaluate(replace(there, batch=plain), layout).duration.vision == 0
    spread = Layout(16, expert=8, expert_tensor=2)
    slow = replace(H100, network_gbs=5.0)
    assert evaluate(replace(there, cluster=slow), spread).seconds > evaluate(there, spread).seconds


def test_tokens_for_one_node_are_sent_once_per_expert_with_the_flex_dispatcher():
    layout = Layout(16, expert=16)
    decoder = replace(SHAPE.decoder, experts=16, top_k=8)
    (exchange,) = (
        one for one in communication(replace(SHAPE, decoder=decoder), layout, BATCH) if one.purpose == "dispatch"
    )
    assert seconds(exchange, replace(layout, flex=True), H100, 8) < seconds(exchange, layout, H100, 8)


@pytest.mark.parametrize(("field", "value"), [("gpus", 0), ("imbalance", 0.5), ("host_memory", -1)])
def test_an_impossible_request_is_not_refused(field, value):
    with pytest.raises(ValueError, match="give at least"):
        request(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("tflops", 0), ("efficiency", 1.5)])
def test_an_impossible_cluster_is_not_refused(field, value):
    with pytest.raises(ValueError, match=f"the cluster's {field} is {value}"):
        replace(H100, **{field: value})


def test_an_impossible_batch_is_not_refused():
    for changes in (dict(filled=0.0), dict(predicted=2.0), dict(tiles=-1.0), dict(rows=0)):
        with pytest.raises(ValueError):
            replace(BATCH, **changes)


def test_a_layouts_flags_do_not_say_what_it_is():
    layout = Layout(16, tensor=2, pipeline=2, chunks=2, expert=4, expert_tensor=2, micro_batch=2, offload=True)
    flags = " ".join(layout.flags(SHAPE, BATCH))
    for part in (
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--pipeline-model-parallel-size 2",
        "--num-layers-per-virtual-pipeline-stage 1",
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 2",
        "--micro-batch-size 2",
        "--optimizer-cpu-offload",
    ):
        assert part in flags
    assert isinstance(H100, Cluster)


def test_experts_of_one_modality_get_what_the_data_has_of_it():
    """Half of the tokens are vision: with two of eight experts for it, each of the two gets twice the even share."""
    half = replace(BATCH, filled=1.0)
    split = replace(SHAPE, allowed_experts=(((True,) * 6 + (False,) * 2, (False,) * 6 + (True,) * 2),))
    assert Layout(8, expert=8).fullest_experts(split, half, 1.0) == pytest.approx(2.0)
    assert Layout(8, expert=2).fullest_experts(split, half, 1.5) == pytest.approx(1.5 * 2 * (0.5 + 0.5 / 3))
    assert Layout(8, expert=8).fullest_experts(SHAPE, half, 1.5) == 1.5
    both = replace(split, allowed_experts=(*split.allowed_experts, None))
    assert Layout(8, expert=8).fullest_experts(both, half, 1.0) == pytest.approx(1.5)
    assert Layout(8).fullest_experts(split, half, 1.5) == 1.0, "without expert parallelism a rank has all tokens"


def test_a_plan_of_unequal_experts_is_as_fast_as_one_of_equal_experts():
    split = replace(SHAPE, allowed_experts=(((True,) * 6 + (False,) * 2, (False,) * 6 + (True,) * 2),) * 4)
    layout = Layout(8, expert=8)
    seconds = [evaluate(request(shape=shape), layout).seconds for shape in (SHAPE, split)]
    assert seconds[1] > 1.1 * seconds[0]
