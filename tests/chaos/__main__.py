# SPDX-License-Identifier: Apache-2.0
"""The whole campaign of faults: `make chaos`. Prints a line for each fault, and writes the table with --write."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from megatron_smar import runtime

runtime.install_or_exit("cpu")

from tests.chaos.campaign import RUNS, Outcome, run_campaign
from tests.chaos.faults import FAULTS, IN_SAVES, damage_newest, kill_one, preempt
from tests.conftest import INTERPRETERS
from tests.functional.conftest import make_world
from tests.slurm.cluster import why_not

BEGIN, END = "<!-- written by make chaos -->", "<!-- end of the table -->"
# Fifteen for each run: all kinds, and again those in saves.
KINDS = [*FAULTS, *IN_SAVES, kill_one, preempt, damage_newest]


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Returns the outcomes as a Markdown table."""
    rows = [
        "| run | fault | at step | during a save | steps made again | seconds to the next step |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in outcomes.items():
        number = list(RUNS).index(name) + 1
        rows += [
            f"| {number} | {outcome.fault} | {outcome.step} | {'yes' if outcome.in_save else ''} | {outcome.lost} | "
            f"{outcome.seconds:.0f} |"
            for outcome in found
        ]
    return "\n".join(rows)


def main() -> None:
    """Runs the campaign for each of `RUNS`; status 1 if a result differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=len(KINDS), help="for each run. Default: %(default)s")
    parser.add_argument("--run", type=int, choices=range(1, len(RUNS) + 1), help="only this run. Default: all")
    parser.add_argument("--seed", type=int, default=1, help="draws order, times and places. Default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between its marks in this document")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"python -m tests.chaos: error: {reason}.")
    os.environ[INTERPRETERS] = "new"  # the undisturbed runs are real ones
    outcomes: dict[str, list[Outcome]] = {}
    names = [name for number, name in enumerate(RUNS, 1) if options.run in (None, number)]
    begin, total = time.monotonic(), options.faults * len(names)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world")
        for name in names:
            outcomes[name] = []

            def report(outcome: Outcome, found: list[Outcome] = outcomes[name]) -> None:
                found.append(outcome)
                done, seconds = sum(map(len, outcomes.values())), time.monotonic() - begin
                where = f"at step {outcome.step}{', in a save' if outcome.in_save else ''}"
                ahead = f"ETA {seconds / done * (total - done):.0f} s"
                cost = f"{outcome.lost} steps again, {outcome.seconds:.0f} s"
                print(f"{done}/{total} {outcome.fault}: {where}, {cost}; {ahead}", flush=True)

            print(name, flush=True)
            root = Path(folder) / f"run_{len(outcomes)}"
            root.mkdir()
            run_campaign(world, name, KINDS[: options.faults], options.seed, root, report)
            print("losses, gradient norms, samples, weights and optimizer state are those of the undisturbed run")
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        options.write.write_text(
            f"{before}{BEGIN}\n\n{table(outcomes)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8"
        )
    print(table(outcomes))


if __name__ == "__main__":
    main()
