# SPDX-License-Identifier: Apache-2.0
"""The first tests on an NVIDIA GPU, in at most ten minutes: `make test-gpu`.

Runs the project on the GPU, compares it with the CPU, and measures it. It needs torch, transformers, megatron-core and
megatron-energon; without Transformer Engine the local layers run on the GPU. A step without a requirement is skipped
and says which; a step that fails is FAILED, and the exit status is 1. Every step has its own process and time limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.gpu import report
from tests.gpu.context import ROOT
from tests.gpu.environment import described, no_gpu
from tests.gpu.plan import STEPS, chosen
from tests.gpu.runner import Row, Settings, run_steps


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=STEPS,
        metavar="STEP",
        help="run these steps, and those that they need (--list shows all)",
    )
    add("--list", action="store_true", help="list the steps and exit")
    add("--nproc", type=int, default=1, metavar="N", help="with 2 or more GPUs: compare every layout with one GPU")
    add("--json", type=Path, default=ROOT / "runs/gpu/report.json", help="the report (default: runs/gpu/report.json)")
    add("--allow-none", action="store_true", help="exit with status 0 if there is no usable GPU")
    add("--minutes", type=float, default=10.0, help="time limit for all steps together (default: %(default)g)")
    trial = parser.add_argument_group("to test this program itself")
    trial.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run the steps on the CPU, to test this program itself; proves nothing about a GPU",
    )
    trial.add_argument("--quick", action="store_true", help="use the smallest shapes and few repetitions")
    trial.add_argument("--tolerance-factor", type=float, default=1.0, help="factor of every tolerance")
    return parser.parse_args()


def main() -> int:
    """Runs the steps and reports; returns the exit status."""
    options = parse()
    steps = chosen(options.only, options.device, options.nproc)
    if options.list:
        print(report.listed(steps))
        return 0
    why_not = no_gpu(options.nproc) if options.device == "cuda" else None
    if why_not:
        print(f"There is no usable NVIDIA GPU here: {why_not}.")
        return 0 if options.allow_none else 1
    path = options.json.resolve()
    settings = Settings(
        options.device,
        options.quick,
        options.nproc,
        options.tolerance_factor,
        path.parent / f"{path.stem}-steps",
        60 * options.minutes,
    )
    environment = described(options.device)
    print(report.heading(environment), flush=True)
    rows = run_steps(steps, settings, Progress(len(steps)))
    report.write(path, environment, rows, {name: str(value) for name, value in vars(options).items()})
    print(report.summary(rows) + f". Report: {path}")
    return 1 if any(row.result == "FAILED" for row in rows) else 0


class Progress:
    """Prints a line when a step ends; on a terminal also the next step and the maximum remaining time."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0

    def __call__(self, row: Row, left: float) -> None:
        self.done += 1
        print(report.line(row, self.done, self.steps), flush=True)
        if sys.stderr.isatty() and self.done < self.steps:
            rest = f"step {self.done + 1} of {self.steps}, at most {left:.0f} s left"
            print(f"  ... {rest}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
