# SPDX-License-Identifier: Apache-2.0
"""Counting of dispatches, compared with a count token by token, and through a real router."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.placement.dispatch import DispatchCounter, counted, leaving, traffic_of
from tests.models import router_of

TEXT, VISION, PADDING = range(3)


def case(seed: int, tokens: int, experts: int, devices: int, top_k: int):
    """Makes tokens with random experts, classes and homes, on devices with any of the experts."""
    rng = random.Random(seed)
    chosen = [rng.sample(range(experts), top_k) for _ in range(tokens)]
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool)
    for row, own in zip(routing_map, chosen, strict=True):
        row[own] = True
    kinds = [rng.randrange(4) for _ in range(tokens)]  # the last kind is not counted
    device_of = [e % devices for e in rng.sample(range(experts), experts)]
    return chosen, routing_map, kinds, [rng.randrange(devices) for _ in range(tokens)], device_of


@settings(max_examples=50)
@given(st.integers(0, 999), st.integers(1, 30), st.sampled_from([(8, 2), (8, 4), (6, 3), (4, 4)]), st.integers(1, 4))
def test_every_number_equals_a_count_token_by_token(seed, tokens, sizes, top_k):
    experts, devices = sizes
    chosen, routing_map, kinds, homes, device_of = case(seed, tokens, experts, devices, top_k)
    classes = torch.nn.functional.one_hot(torch.tensor(kinds), 4)[:, :3].bool()
    found = traffic_of(routing_map, classes, torch.tensor(homes), device_of)
    copies, single, reached = Counter(), Counter(), Counter()
    for own, kind, home in zip(chosen, kinds, homes, strict=True):
        places = [device_of[e] for e in own]
        reached[kind, len(set(places))] += 1
        for place in places:
            copies[kind, home, place] += 1
        for place in set(places):
            single[kind, home, place] += 1
    for kind in (TEXT, VISION, PADDING):
        own = [(n, number) for (k, n), number in reached.items() if k == kind]
        assert [int(x) for x in found.reached[kind]] == [reached[kind, n] for n in range(devices + 1)]
        assert int(found.tokens[kind]) == sum(number for _, number in own)
        if own:
            crossing = sum(number for n, number in own if n > 1) / sum(number for _, number in own)
            mean = sum(n * number for n, number in own) / sum(number for _, number in own)
            assert float(found.crossing[kind]) == pytest.approx(crossing)
            assert float(found.devices[kind]) == pytest.approx(mean)
        for home in range(devices):
            for place in range(devices):
                assert int(found.copies[kind, home, place]) == copies[kind, home, place]
                assert int(found.single[kind, home, place]) == single[kind, home, place]
        gone = sum(number for (k, home, place), number in single.items() if k == kind and home != place)
        assert int(leaving(found.single)[kind]) == gone


def test_a_routers_choices_are_counted_by_modality_and_home_and_repeated_rows_are_not(single_rank):
    router = router_of(None, num_moe_experts=4, moe_router_topk=2)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(5, 3, 48, generator=generator, dtype=torch.float64)
    mask = torch.zeros(5, 3, 2, dtype=torch.bool)
    mask[:3, :, TEXT], mask[3:, 0, VISION] = True, True  # the last two positions of rows 1 and 2 are padding
    counter = DispatchCounter({"two": {1: [0, 1, 0, 1]}})
    with counted([router], counter), torch.no_grad():
        counter.rows = [4, 7, -1]
        _, chosen = router(inputs, mask)
    counter.reduce([])
    chosen = chosen.view(5, 3, 4).double()
    expected = torch.stack([chosen[:3, :2].sum((0, 1)), chosen[3:, 0].sum(0), chosen[3:, 1].sum(0)])
    assert torch.equal(counter.loads[1], expected)
    traffic = counter.traffic["two"][1]
    assert traffic.tokens.tolist() == [6, 2, 2]
    assert traffic.copies[TEXT].sum(-1).tolist() == [6, 6], "rows 4 and 7 have their homes on devices 0 and 1"
    assert traffic.copies[VISION, 1].sum() == 0, "row 7 has no vision token"
    with torch.no_grad():
        router(inputs, mask)
    assert torch.equal(counter.traffic["two"][1].copies, traffic.copies), "counting has ended with the context"
