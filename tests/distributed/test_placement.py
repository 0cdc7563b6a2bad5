# SPDX-License-Identifier: Apache-2.0
"""Placed experts under expert parallelism: training continues unchanged, and what is counted is what Megatron sends."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.batches import IMAGE, make_batch
from tests.distributed.cases import EP
from tests.distributed.laboratory import read_values, run_jobs
from tests.distributed.test_layouts import EP_2, STEPS, Layout, largest_difference, sharded, smoes
from tests.launch import run

EXPERTS, SAVED = 8, 2
TOLERANCE = 1e-6  # absolute deviation of losses and distances, which are between 1 and 10
WIDE = f"{EP} --num-experts {EXPERTS}"
BIASED = "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-bias-update-rate 0.1"
HARD = "--modality-routing hard --hard-experts text=0,2-4,6 vision=1,5,7"
LAYOUTS = {
    "expert bias, distributed optimizer": sharded(replace(EP_2, flags=f"{WIDE} {BIASED} --moe-router-dtype fp32")),
    "dense layers between, shared experts": replace(
        EP_2, flags=f"{WIDE} --moe-layer-freq ([0,1]*2) --moe-shared-expert-intermediate-size 64"
    ),
    "hard": replace(EP_2, flags=f"{WIDE} {HARD}"),
    "SMoES with Gaussian scores": replace(smoes("gaussian", EP_2)[0], flags=f"{WIDE} --clip-grad 0"),
}
# Is also resumed with the optimizer's state of each expert left where it was.
CONTROL = "dense layers between, shared experts"


def random_plan(checkpoint: Any, seed: int) -> Any:
    """Returns a plan with a random order in each layer; hard routing needs the same groups in all layers."""
    from megatron_smar.placement.plan import Plan

    rng, numbers = random.Random(seed), list(range(checkpoint.num_experts))
    orders = {layer: tuple(rng.sample(numbers, len(numbers))) for layer in checkpoint.layers}
    if checkpoint.strategy.name == "hard":
        orders = {layer: (*rng.sample([1, 5, 7], 3), *rng.sample([0, 2, 3, 4, 6], 5)) for layer in checkpoint.layers}
    numbering = checkpoint.order.layers if checkpoint.order else {}
    return Plan(2, orders, {layer: (0.5,) * len(numbers) for layer in orders}, "chance", numbering)


def left_behind(checkpoint: Any) -> Any:
    """Makes a checkpoint keep the optimizer's state in place, as if it were not known to belong to experts."""
    known = checkpoint.axis
    checkpoint.axis = lambda key: None if key.startswith("optimizer") else known(key)
    return checkpoint


class Runs:
    """Trains under each layout, places the experts of the checkpoint in the middle, and resumes from both."""

    def __init__(self, folder: Path) -> None:
        from megatron_smar.placement.permute import PlacedCheckpoint, apply_plan
        from megatron_smar.placement.plan import Plan
        from tests.models import build_hf_model

        self.folder = folder
        build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder / "vision")
        for step in range(STEPS):
            torch.save(make_batch("mixed", seed=step), folder / f"batch_{step}.pt")
        names = {name: f"run_{number}" for number, name in enumerate(LAYOUTS)}
        self.names = names
        jobs = [layout.job(folder, names[name], "--save-interval", str(SAVED)) for name, layout in LAYOUTS.items()]
        run_jobs(jobs, 2, folder / "first.json")
        then = []
        for name, layout in LAYOUTS.items():
            trained = PlacedCheckpoint(folder / names[name], SAVED)
            plan = random_plan(trained, seed=len(name))
            if layout.strategy:  # SMoES: its bins follow the same loads, so that another order would be another run
                loads = trained.state("loads")
                assert list(loads) == trained.layers and all(load.sum() > 0 for load in loads.values())
                plan = Plan.of_loads(loads, 2, "loads", {})
            assert all(list(order) != sorted(order) for order in plan.orders.values())
            apply_plan(trained, plan, folder / f"{names[name]}_placed", lambda _: None)
            then.append(self._resumed(layout, name, "placed"))
            if name == CONTROL:
                apply_plan(left_behind(trained), plan, folder / f"{names[name]}_control", lambda _: None)
                then.append(self._resumed(layout, name, "control"))
        run_jobs(then, 2, folder / "then.json")

    def _resumed(self, layout: Layout, name: str, kind: str) -> dict[str, Any]:
        load = self.folder / f"{self.names[name]}_{kind}"
        flags = layout.flags.replace("text=0,2-4,6 vision=1,5,7", "text=3-7 vision=0-2")
        return replace(layout, flags=flags).job(self.folder, f"{self.names[name]}_{kind}_on", "--load", str(load))

    def difference(self, name: str, kind: str = "placed") -> float:
        """Returns the largest deviation of the resumed run from the undisturbed one."""
        undisturbed = read_values(self.folder / self.names[name])[SAVED:]
        resumed = read_values(self.folder / f"{self.names[name]}_{kind}_on")
        if name != "hard":
            return largest_difference(undisturbed, resumed)
        return max(abs(a["lm loss"] - b["lm loss"]) for a, b in zip(undisturbed, resumed, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("placement"))


@pytest.mark.matrix
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_continues_with_the_same_losses_after_its_experts_were_moved(runs: Runs, name: str) -> None:
    assert runs.difference(name) <= TOLERANCE


@pytest.mark.matrix
def test_without_the_optimizers_state_of_the_moved_experts_the_losses_would_differ(runs: Runs) -> None:
    assert runs.difference(CONTROL, "control") > 1000 * TOLERANCE


@pytest.mark.matrix
def test_the_checkpoints_of_a_resumed_run_still_say_where_the_experts_are(runs: Runs) -> None:
    from megatron_smar.placement.permute import PlacedCheckpoint

    placed = PlacedCheckpoint(runs.folder / f"{runs.names[CONTROL]}_placed")
    resumed = PlacedCheckpoint(runs.folder / f"{runs.names[CONTROL]}_placed_on")
    assert resumed.order is not None and resumed.order == placed.order


@pytest.mark.matrix
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_placements_are_undone_at_once_bit_by_bit(runs: Runs, tmp_path: Path, name: str) -> None:
    from megatron_smar.placement.permute import PlacedCheckpoint, apply_plan, undo

    first = PlacedCheckpoint(runs.folder / runs.names[name], SAVED)
    once = PlacedCheckpoint(runs.folder / f"{runs.names[name]}_placed")
    plan = random_plan(once, seed=5)
    if name == "hard":
        plan = replace(plan, orders={layer: (7, 3, 6, 5, 4, 2, 0, 1) for layer in once.layers})
    apply_plan(once, plan, tmp_path / "twice", lambda _: None)
    undo(PlacedCheckpoint(tmp_path / "twice"), tmp_path / "back", lambda _: None)
    back = PlacedCheckpoint(tmp_path / "back")
    assert set(back.reader.tensors) == set(first.reader.tensors)
    moved = 0
    for key in first.reader.tensors:
        stored = first.whole(key)
        assert torch.equal(back.whole(key), stored), key
        moved += not torch.equal(once.whole(key), stored)
    assert moved >= 9, "router, both linear layers of the experts, with two moments each"
    for key in set(first.reader.objects) - {"common_state/shard_0_1"}:
        assert back.reader.read_object(key).getvalue() == first.reader.read_object(key).getvalue(), key
    assert vars(back.args) == vars(first.args)


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns what was counted and what was sent on expert-parallel groups of 1, 2 and 4 ranks, from one launch."""
    folder = tmp_path_factory.mktemp("dispatch")
    run("tests/distributed/dispatches.py", folder, ranks=4, idle=120)
    return torch.load(folder / "sent.pt")


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_copies_counted_are_those_that_megatrons_dispatcher_sends(sent: dict[str, Any], ranks: int) -> None:
    found = sent[ranks]
    for layer, counted in found["counted"].items():
        assert torch.equal(counted.sum(dim=0), found["input_splits"][layer]), "rows are homes, columns are devices"
        assert torch.equal(counted.sum(dim=0), found["output_splits"][layer])
        away = counted.sum(dim=0) - counted.sum(dim=0).diag().diag()
        assert int(away.sum()) * found["bytes_per_copy"] == found["bytes_sent"][layer] > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_counts_for_many_devices_what_those_devices_would_send(sent: dict[str, Any], ranks: int) -> None:
    for layer, counted in sent[ranks]["counted"].items():
        assert torch.equal(sent[1]["counted_for"][ranks][layer], counted)
