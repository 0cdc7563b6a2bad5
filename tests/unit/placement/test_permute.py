# SPDX-License-Identifier: Apache-2.0
"""Moving experts in a checkpoint: every kind of tensor, however it is split, and what cannot be moved."""

import itertools
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_smar.checkpoint.describe import describe
from megatron_smar.checkpoint.folders import ConversionError
from megatron_smar.checkpoint.torch_dist import Shard, write_checkpoint
from megatron_smar.placement.permute import PlacedCheckpoint, apply_plan, undo
from megatron_smar.placement.plan import Plan
from megatron_smar.routing.strategies import STRATEGIES
from megatron_smar.routing.strategies.base import StrategyConfig

LAYERS, EXPERTS, HIDDEN, M = 3, 4, 5, 2
STACK = "language_model.decoder.layers.mlp."
ORDERS = {1: (2, 0, 3, 1), 2: (3, 2, 1, 0), 3: (1, 0, 3, 2)}
PLAN = Plan(2, ORDERS, {layer: (0.5,) * EXPERTS for layer in ORDERS}, "test")
FP8 = "experts.experts.linear_fc1._extra_state"
# For each weight of the router and the experts, the shape of one layer and its axis of experts.
KNOWN = {
    "router.weight": ((EXPERTS, HIDDEN), 0),
    "router.bias": ((EXPERTS,), 0),
    "router.expert_bias": ((EXPERTS,), 0),
    "router.modality_bias.bias": ((M, EXPERTS), 1),
    "experts.experts.linear_fc1.weight": ((EXPERTS, 6, HIDDEN), 0),
    "shared_experts.linear_fc1.weight": ((6, HIDDEN), None),
}


@dataclass(frozen=True)
class Stateful(StrategyConfig):
    """A strategy with state.

    Attributes:
        level: Not used.
    """

    name = "stateful"
    title = "test"
    expert_axes: ClassVar = {"loads": 1, "bins": 0, "steps": None}

    level: int = 0


STATE = {"loads": ((M, EXPERTS), 1), "bins": ((EXPERTS,), 0), "steps": ((EXPERTS,), None)}


@pytest.fixture(autouse=True)
def stateful(monkeypatch):
    monkeypatch.setitem(STRATEGIES, Stateful.name, Stateful)


def spans(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def write(
    folder: Path, tensors: dict[str, torch.Tensor], steps=lambda key, shape: (1, *shape[1:]), **arguments
) -> Path:
    """Writes a checkpoint as Megatron would, each tensor in chunks of the given steps."""
    shards = []
    for key, tensor in tensors.items():
        step = steps(key, tuple(tensor.shape))
        for part in itertools.product(*(spans(size, n) for size, n in zip(tensor.shape, step, strict=True))):
            data = tensor[tuple(slice(a, b) for a, b in part)].clone()
            offsets, sizes = tuple(a for a, _ in part), tuple(b - a for a, b in part)
            shards.append(Shard(key, offsets, sizes, tuple(tensor.shape), tensor.dtype, lambda data=data: data))
    stacked, own = f"{STACK}{FP8}", f"language_model.decoder.layers.2.mlp.{FP8}"
    objects = [ShardedObject(own, f"2.{e}", (EXPERTS,), (e,)) for e in range(EXPERTS)]
    if f"{STACK}router.weight" in tensors:
        places = itertools.product(range(LAYERS), range(EXPERTS))
        objects = [ShardedObject(stacked, f"{n}.{e}", (LAYERS, EXPERTS), (n, e)) for n, e in places]
    args = Namespace(**{"num_layers": LAYERS, "num_experts": EXPERTS, "modality_routing": "stateful"} | arguments)
    write_checkpoint(folder, shards, objects, args, lambda _: None)
    return folder


def contents() -> dict[str, torch.Tensor]:
    """Returns the tensors of a small model with its optimizer's state; every number occurs once."""
    kinds = {name: shape for name, (shape, _) in KNOWN.items()}
    kinds |= {f"router.strategy.{name}": shape for name, (shape, _) in STATE.items()}
    names = [f"{STACK}{name}" for name in kinds]
    shapes = dict(zip(names, kinds.values(), strict=True))
    for kind in ("exp_avg", "exp_avg_sq"):
        shapes |= {f"optimizer.state.{kind}.{name}": shapes[name] for name in names[:5]}
    start, found = 0, {}
    for name, shape in shapes.items():
        size = (LAYERS, *shape)
        found[name] = torch.arange(start, start + torch.Size(size).numel()).view(size)
        start += found[name].numel()
    return found | {"connector.linear_1.weight": torch.arange(start, start + 8).view(2, 4)}


def expected(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor with its experts moved."""
    name = key.partition(STACK)[2]
    known = KNOWN | {f"router.strategy.{state}": value for state, value in STATE.items()}
    axis = known[name][1] if name else None
    if axis is None:
        return tensor
    return torch.stack([part.index_select(axis, torch.tensor(ORDERS[n])) for n, part in enumerate(tensor, start=1)])


@settings(max_examples=4)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_all_that_counts_experts_moves_with_them_however_it_was_split(tmp_path_factory, layers, experts, rest):
    folder = tmp_path_factory.mktemp("moved")

    def steps(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (min(layers, shape[0]), *(min(step, n) for step, n in zip((experts, rest, 2), shape[1:], strict=False)))

    tensors = contents()
    placed = PlacedCheckpoint(write(folder / "before", tensors, steps))
    written: list[int] = []
    apply_plan(placed, PLAN, folder / "after", written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    after = PlacedCheckpoint(folder / "after")
    for key, tensor in tensors.items():
        assert torch.equal(after.whole(key), expected(key, tensor)), key
        assert after.reader.chunks(key) == placed.reader.chunks(key)
    undo(after, folder / "back", written.append)
    back = PlacedCheckpoint(folder / "back")
    assert all(torch.equal(back.whole(key), tensor) for key, tensor in tensors.items())


def test_the_fp8_state_of_an_expert_moves_with_it(tmp_path):
    before = PlacedCheckpoint(write(tmp_path / "before", contents()))
    apply_plan(before, PLAN, tmp_path / "after", lambda _: None)
    reader = PlacedCheckpoint(tmp_path / "after").reader
    for layer, order in ORDERS.items():
        for place, expert in enumerate(order):
            key = f"{STACK}{FP8}/shard_{layer - 1}.{place}_{LAYERS}.{EXPERTS}"
            assert torch.load(reader.read_object(key), weights_only=True) == [f"{layer - 1}.{expert}"]


def test_layers_with_keys_of_their_own_are_told_by_their_numbers(tmp_path):
    shapes = {f"language_model.decoder.layers.{n}.mlp.{name}": value for n in (1, 2) for name, value in KNOWN.items()}
    tensors = {key: torch.rand(shape) for key, (shape, _) in shapes.items()}
    checkpoint = PlacedCheckpoint(write(tmp_path / "before", tensors))
    assert checkpoint.layers == [2, 3], "layer 1 is dense"
    orders = {layer: ORDERS[layer] for layer in (2, 3)}
    plan = Plan(2, orders, {layer: (0.5,) * EXPERTS for layer in orders}, "test")
    apply_plan(checkpoint, plan, tmp_path / "after", lambda _: None)
    after = PlacedCheckpoint(tmp_path / "after")
    for place, expert in enumerate(orders[3]):
        state = after.reader.read_object(f"language_model.decoder.layers.2.mlp.{FP8}/shard_{place}_{EXPERTS}")
        assert torch.load(state, weights_only=True) == [f"2.{expert}"]
    for key, tensor in tensors.items():
        axis, order = shapes[key][1], orders[int(key.split(".")[3]) + 1]
        moved = tensor if axis is None else tensor.index_select(axis, torch.tensor(order))
        assert torch.equal(after.whole(key), moved), key


def test_the_strategys_loads_are_read_by_layer(tmp_path):
    tensors = contents()
    found = PlacedCheckpoint(write(tmp_path / "before", tensors)).state("loads")
    assert list(found) == [1, 2, 3]
    assert torch.equal(torch.stack(list(found.values())), tensors[f"{STACK}router.strategy.loads"])


def test_inspect_shows_a_placement_and_none_after_it_is_undone(tmp_path):
    apply_plan(PlacedCheckpoint(write(tmp_path / "before", contents())), PLAN, tmp_path / "after", lambda _: None)
    shown = describe(tmp_path / "after")
    assert "placement    for 2 devices: 12 of 12 experts of 3 layers were moved" in shown.table()
    assert shown.as_json()["placement"].startswith("for 2 devices")
    undo(PlacedCheckpoint(tmp_path / "after"), tmp_path / "back", lambda _: None)
    assert "\nplacement" not in describe(tmp_path / "back").table()
    with pytest.raises(ConversionError, match="has no placement to undo"):
        undo(PlacedCheckpoint(tmp_path / "back"), tmp_path / "again", lambda _: None)


def test_what_is_beside_a_checkpoint_goes_with_it(tmp_path):
    folder = write(tmp_path / "before", contents())
    for name in ("dataloader/release", "hf"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    (folder / "flags.txt").write_text("--num-experts 4")
    apply_plan(PlacedCheckpoint(folder), PLAN, tmp_path / "after", lambda _: None)
    for name in ("dataloader/release/file", "hf/file", "flags.txt"):
        assert (tmp_path / "after" / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_experts": None}, "holds a dense model, which has no experts to place"),
        ({"modality_routing": "gone"}, "--modality-routing gone, and this version knows"),
        ({"moe_router_num_groups": 2}, "--moe-router-num-groups 2: a group is a run of neighboring experts"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1: the experts of multi-token prediction layers cannot be placed"),
        ({"modality_routing": "none"}, r"has mlp\.router\.strategy\.loads, and --modality-routing none does not say"),
        ({"num_experts": 8}, "is for 4 experts in layers 1, 2, 3, and .* has 8"),
    ],
)
def test_a_checkpoint_that_cannot_be_placed_is_refused_and_nothing_is_written(tmp_path, arguments, said):
    folder = write(tmp_path / "before", contents(), **arguments)
    with pytest.raises(ValueError, match=said) as refusal:
        apply_plan(PlacedCheckpoint(folder), PLAN, tmp_path / "after", lambda _: None)
    assert f"--load {folder}" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "after").exists() and not (tmp_path / "after.partial").exists()


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("language_model.mtp.layers.0.transformer_layer.mlp.router.weight", (EXPERTS, HIDDEN), "in an unknown place"),
        (f"{STACK}experts.fc1_latent_proj.weight", (LAYERS, 4, HIDDEN), "not known to count experts or not to"),
        (f"{STACK}router.new", (LAYERS, EXPERTS), r"has mlp\.router\.new"),
        (f"{STACK}experts.experts.linear_fc2.weight", (LAYERS, 3, HIDDEN), "without an axis of 4 experts"),
        ("optimizer.state.exp_avg.language_model.gone", (EXPERTS,), "an optimizer's state that belongs to no weight"),
    ],
)
def test_a_tensor_of_which_nothing_is_known_is_refused(tmp_path, key, shape, said):
    folder = write(tmp_path / "before", contents() | {key: torch.zeros(shape)})
    with pytest.raises(ConversionError, match=said):
        apply_plan(PlacedCheckpoint(folder), PLAN, tmp_path / "after", lambda _: None)


def test_a_plan_for_other_numbers_of_the_experts_is_refused(tmp_path):
    apply_plan(PlacedCheckpoint(write(tmp_path / "before", contents())), PLAN, tmp_path / "after", lambda _: None)
    with pytest.raises(ConversionError, match="--plan was made for other numbers of the experts"):
        apply_plan(PlacedCheckpoint(tmp_path / "after"), PLAN, tmp_path / "again", lambda _: None)


def test_an_optimizers_state_that_was_saved_as_sharded_is_refused(trained, tmp_path):
    checkpoint = PlacedCheckpoint(trained["as stored"])
    plan = Plan(2, dict.fromkeys(checkpoint.layers, (1, 0, 3, 2)), {}, "test")
    with pytest.raises(ConversionError, match="save it without --no-dist-ckpt-optim-fully-reshardable"):
        apply_plan(checkpoint, plan, tmp_path / "after", lambda _: None)


def test_hard_routing_is_renumbered_and_gets_its_own_numbers_back(tmp_path):
    tensors = {key: tensor for key, tensor in contents().items() if ".strategy." not in key}
    settings = {"modality_routing": "hard", "hard_experts": ["text=0.5", "vision=0.5"]}
    folder = write(tmp_path / "before", tensors, **settings)
    orders = {1: (3, 2, 1, 0), 2: (2, 3, 0, 1), 3: (2, 3, 1, 0)}
    plan = Plan(2, orders, {layer: (0.5,) * EXPERTS for layer in orders}, "test")
    apply_plan(PlacedCheckpoint(folder), plan, tmp_path / "after", lambda _: None)
    after = PlacedCheckpoint(tmp_path / "after")
    assert after.args.hard_experts == ["text=2-3", "vision=0-1"]
    undo(after, tmp_path / "back", lambda _: None)
    assert PlacedCheckpoint(tmp_path / "back").args.hard_experts == ["text=0.5", "vision=0.5"]
    with pytest.raises(ConversionError, match="--hard-experts holds for all layers, but would be"):
        apply_plan(PlacedCheckpoint(folder), PLAN, tmp_path / "other", lambda _: None)
