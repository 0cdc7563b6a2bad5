# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of one layout is resumed under another layout, with the same weights, optimizer, scheduler and losses.

For each transition, a run with the first layout saves a checkpoint on the way and continues. A run with the second
layout loads this checkpoint and must log the same values as the uninterrupted run for the same steps. Without the
optimizer's moments, or with the learning rate of another step, the values differ far more (shown by the last test).
"""

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.batches import IMAGE, ROWS, make_batch
from tests.distributed.cases import (
    COMMON,
    CP,
    EP,
    MODELS,
    PP,
    SMAR,
    SMOES,
    STRATEGIES,
    TP,
    TP_SP,
    VIRTUAL,
)
from tests.distributed.laboratory import read_values, run_jobs
from tests.launch import load_weights

STEPS, SAVED = 4, 2  # steps of the uninterrupted run, and the step of the checkpoint that is loaded
MICRO_BATCHES = 2
TOLERANCE = 1e-4  # absolute deviation of the losses, which are between 1 and 10
TOLERANCE_OF_STATE = 1e-6
LOSSES = (  # of each strategy
    {"smar loss"},
    {"smoes information loss", "smoes balance loss"},
    {"modality balance loss", "router orthogonal loss"},
)
SHARDED = "--use-distributed-optimizer"
TRAINING = [
    *COMMON,
    *MODELS["four layers"],
    *SMAR,
    *"--optimizer adam --lr 5e-3 --min-lr 5e-4 --lr-decay-style cosine --lr-warmup-iters 1 --clip-grad 1".split(),
    # The vocabulary is padded to 144 rows under TP 1 and to 192 under TP 2; the padding has no effect on a loss.
    *"--make-vocab-size-divisible-by 48".split(),
    *f"--weight-decay 0.1 --global-batch-size {ROWS} --train-iters {STEPS} --lr-decay-iters {STEPS}".split(),
]


@dataclass(frozen=True)
class Layout:
    """A parallel layout of model and batch, whether the model's embeddings are tied, and the strategy if not SMAR."""

    ranks: int
    data_parallel: int
    flags: str = ""
    is_tied: bool = False
    strategy: tuple[str, ...] = ()

    def job(self, folder: Path, name: str, *more: str) -> dict[str, Any]:
        """Returns the job in the form of steps.py."""
        training = [flag for flag in TRAINING if not (self.is_tied and "untie" in flag)]
        rows = ROWS // MICRO_BATCHES // self.data_parallel
        # Megatron clips float32 gradients only.
        strategy = [*self.strategy, "--clip-grad", "0"] if self.strategy else []
        flags = [*training, *strategy, *self.flags.split(), "--micro-batch-size", str(rows), *more]
        return {
            "batches": [str(folder / f"batch_{step}.pt") for step in range(STEPS)],
            "folder": str(folder / name),
            "save_before": False,
            "dtype": "float64" if self.strategy else "float32",
            "flags": [*flags, "--vision-model", str(folder / "vision")],
        }


def sharded(layout: Layout) -> Layout:
    """Returns the same layout with the distributed optimizer."""
    return replace(layout, flags=f"{layout.flags} {SHARDED}")


def tied(layout: Layout) -> Layout:
    """Returns the same layout with one matrix for embedding and output layer."""
    return replace(layout, is_tied=True)


def smoes(scores: str, *layouts: Layout) -> tuple[Layout, ...]:
    """Returns the same layouts with SMoES, whose state is small differences of counts, in float64."""
    return tuple(replace(layout, strategy=(*SMOES, "--smoes-scores", scores)) for layout in layouts)


def ernie(*layouts: Layout) -> tuple[Layout, ...]:
    """Returns the same layouts with ERNIE's bias on the choice of experts, which changes the routing, in float64."""
    return tuple(replace(layout, strategy=STRATEGIES["ERNIE"]) for layout in layouts)


ONE, DP_2, EP_2 = Layout(1, 1), Layout(2, 2), Layout(2, 2, EP)
TP_2, TP_2_ETP_2, CP_2, PP_2, VPP_2 = (Layout(2, 1, flags) for flags in (TP_SP, TP, CP, PP, VIRTUAL))
TP_2_EP_2_DP_2, PP_2_EP_2 = Layout(4, 2, f"{TP_SP} {EP}"), Layout(4, 2, f"{PP} {EP}")
EP_4, TP_2_PP_2 = Layout(4, 4, "--expert-model-parallel-size 4"), Layout(4, 1, f"{TP_SP} {PP}")
TP_2_CP_2, VPP_2_TP_2 = Layout(4, 1, f"{TP_SP} {CP}"), Layout(4, 1, f"{VIRTUAL} {TP}")

TRANSITIONS = {
    "DP 2 to TP 2": (DP_2, TP_2),
    "TP 2 to PP 2": (TP_2, PP_2),
    "PP 2 to VPP 2": (PP_2, VPP_2),
    "VPP 2 to EP 2": (VPP_2, EP_2),
    "EP 2 to TP 2 x ETP 2": (EP_2, TP_2_ETP_2),
    "CP 2 to EP 2": (CP_2, EP_2),
    "TP 2 x ETP 2 to EP 2, distributed optimizer": (sharded(TP_2_ETP_2), sharded(EP_2)),
    "EP 2 to VPP 2, distributed optimizer": (sharded(EP_2), sharded(VPP_2)),
    "EP 2 to one process, distributed optimizer": (sharded(EP_2), sharded(ONE)),
    "PP 2 to TP 2, tied embeddings": (tied(PP_2), tied(TP_2)),
    "EP 2 to PP 2, SMoES with attention scores": smoes("attention", EP_2, PP_2),
    "TP 2 to CP 2, SMoES with Gaussian scores": smoes("gaussian", TP_2, CP_2),
    "EP 2 to PP 2, ERNIE": ernie(EP_2, PP_2),
}
ON_FOUR_RANKS = {
    "TP 2 x EP 2 x DP 2 to PP 2 x EP 2, distributed optimizer": (sharded(TP_2_EP_2_DP_2), sharded(PP_2_EP_2)),
    "PP 2 x EP 2 to TP 2 x CP 2": (PP_2_EP_2, TP_2_CP_2),
    "TP 2 x EP 2 x DP 2 to VPP 2 x TP 2 x ETP 2, distributed optimizer": (sharded(TP_2_EP_2_DP_2), sharded(VPP_2_TP_2)),
    "VPP 2 x TP 2 x ETP 2 to EP 2": (VPP_2_TP_2, EP_2),
    "EP 4 to TP 2 x PP 2, SMoES with attention scores": smoes("attention", EP_4, TP_2_PP_2),
    "EP 4 to TP 2 x PP 2, SMoES with Gaussian scores": smoes("gaussian", EP_4, TP_2_PP_2),
}
ALL = TRANSITIONS | ON_FOUR_RANKS
RARE = {  # only in `make test-matrix`: others have the same parts
    *ON_FOUR_RANKS,
    "VPP 2 to EP 2",
    "EP 2 to TP 2 x ETP 2",
    "CP 2 to EP 2",
    "EP 2 to VPP 2, distributed optimizer",
    "EP 2 to one process, distributed optimizer",
    "PP 2 to TP 2, tied embeddings",
    "TP 2 to CP 2, SMoES with Gaussian scores",
}
CONTROL = "TP 2 to PP 2"  # is also run without the optimizer's state


class Runs:
    """Runs all jobs of the session, those with the same number of ranks in one program."""

    def __init__(self, folder: Path, wanted: list[str]) -> None:
        from tests.models import build_hf_model

        self.folder = folder
        build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder / "vision")
        for step in range(STEPS):
            torch.save(make_batch("mixed", seed=step), folder / f"batch_{step}.pt")
        befores = dict.fromkeys(ALL[name][0] for name in wanted)
        self.before = {layout: f"before_{number}" for number, layout in enumerate(befores)}
        self.after = {name: f"after_{number}" for number, name in enumerate(wanted)}
        saving = ("--save-interval", str(SAVED))
        first = [(layout, name, *saving) for layout, name in self.before.items()]
        then = [(ALL[name][1], after, *self._loading(name)) for name, after in self.after.items()]
        if CONTROL in wanted:
            then.append((ALL[CONTROL][1], "forgetful", *self._loading(CONTROL), "--no-load-optim"))
        # The runs on two ranks are in the middle of the list, so that one launch runs those of both halves.
        first.sort(key=lambda run: -abs(run[0].ranks - 2))
        then.sort(key=lambda run: abs(run[0].ranks - 2))
        for number, (ranks, runs) in enumerate(groupby(first + then, key=lambda run: run[0].ranks)):
            run_jobs([layout.job(folder, *rest) for layout, *rest in runs], ranks, folder / f"jobs_{number}.json")

    def _loading(self, name: str) -> tuple[str, ...]:
        return "--load", str(self.folder / self.before[ALL[name][0]]), "--ckpt-step", str(SAVED)

    def logged(self, name: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Returns what the uninterrupted run logged after the checkpoint, and what the resumed run logged."""
        return read_values(self.folder / self.before[ALL[name][0]])[SAVED:], read_values(self.folder / self.after[name])


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    wanted = [item.callspec.params["name"] for item in request.session.items if "continues_under" in item.name]
    return Runs(tmp_path_factory.mktemp("layouts"), wanted)


def largest_difference(expected: list[dict[str, float]], found: list[dict[str, float]]) -> float:
    """Returns the largest difference of the losses and distances over all steps."""
    pairs = list(zip(expected, found, strict=True))
    assert len(pairs) == STEPS - SAVED
    names = [name for name in expected[0] if "loss" in name or "mrd" in name]
    own = next(losses for losses in LOSSES if losses <= set(names))
    assert {"lm loss", "mrd distance"} <= set(names)
    assert all(abs(step[name]) > 1e-4 for step in expected for name in own)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in names)


LAYOUTS = [pytest.param(name, marks=pytest.mark.matrix if name in RARE else []) for name in ALL]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_continues_under_another_layout(runs: Runs, name: str) -> None:
    expected, found = runs.logged(name)
    assert [step["learning rate"] for step in found] == pytest.approx([step["learning rate"] for step in expected])
    assert largest_difference(expected, found) <= (TOLERANCE_OF_STATE if ALL[name][0].strategy else TOLERANCE)


def test_the_bias_on_the_choice_is_not_the_same_at_the_end(runs: Runs) -> None:
    before, after = ALL["EP 2 to PP 2, ERNIE"][0], runs.after["EP 2 to PP 2, ERNIE"]
    expected, found = (
        load_weights(runs.folder / folder / f"iter_{STEPS:07}") for folder in (runs.before[before], after)
    )
    (name,) = [name for name in expected if name.endswith("router.strategy.bias")]
    assert expected[name].abs().max() > 0.05, "it has moved more than once"
    torch.testing.assert_close(found[name], expected[name])


def test_losses_without_the_optimizers_state_differ_noticeably(runs: Runs) -> None:
    expected, _ = runs.logged(CONTROL)
    assert largest_difference(expected, read_values(runs.folder / "forgetful")) > 10 * TOLERANCE
