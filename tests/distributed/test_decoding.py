# SPDX-License-Identifier: Apache-2.0
"""Decoding with the cache under every layout that evaluation runs under."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.decoding import LAYOUTS, LIMITS
from tests.launch import run

CASES = [
    pytest.param(ranks, name, marks=pytest.mark.matrix if ranks > 2 else [])
    for ranks, layouts in LAYOUTS.items()
    for name in layouts
]


@pytest.fixture(scope="module")
def decoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    items = [item for item in request.session.items if item.path == request.path]
    found = {}
    for ranks in {item.callspec.params["ranks"] for item in items}:
        folder: Path = tmp_path_factory.mktemp("decoding")
        run("tests/distributed/decoding.py", folder, ranks=ranks, idle=120)
        found[ranks] = json.loads((folder / "decoded.json").read_text())
    return found


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_cached_logits_equal_those_recomputed_without_a_cache(decoded: dict[int, Any], ranks: int, name: str) -> None:
    found = decoded[ranks][name]
    assert found["compared"] >= sum(LIMITS)
    assert found["difference"] <= 1e-12  # float64


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_rank_of_every_layout_decodes_the_same_tokens(decoded: dict[int, Any], ranks: int, name: str) -> None:
    reference = decoded[ranks]["latent, replicas" if name.startswith("latent") else "replicas"]["new"][0]
    if "sharded" in name:  # Megatron initializes the halves of a gated layer differently then: it is another model
        reference = decoded[ranks][name]["new"][0]
    assert all(new == reference for new in decoded[ranks][name]["new"])
    assert [len(new) for new in reference] == LIMITS
