# SPDX-License-Identifier: Apache-2.0
r"""What the preflight tries next, and its verdict; the batch script runs it after each round.

    python -m megatron_smar.launch.preflight.rounds FOLDER --nodes N --seconds S --among NODE,NODE,...

Exits with 3 if there are groups of nodes to try; FOLDER/groups has a line for each: kind, file for its output, number
of nodes, nodes. Otherwise it prints a table, and exits with 0 if there are nodes for the run, which are in
FOLDER/nodes, else with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_smar.launch.preflight.state import AGAIN, ALL_REDUCE, NODE, Trial, next_groups, read_trial
from megatron_smar.launch.preflight.verdict import judge, well_alone

ROUNDS = "rounds.json"  # all groups that have been tried
MOST = 6  # rounds; each has a time limit


def advance(folder: Path, nodes: tuple[str, ...], needed: int, seconds: float) -> tuple[int, str]:
    """Plans the next round, or ends the preflight.

    Args:
        folder: The preflight's folder in the attempt's logs.
        nodes: All nodes of the job, in SLURM's order.
        needed: Number of nodes that the run needs.
        seconds: Time limit of each round.

    Returns:
        The exit status, and what to print.
    """
    file = folder / ROUNDS
    now = time.time()
    if not file.is_file():
        _plan(folder, {"began": now, "groups": []}, NODE, [(node,) for node in nodes])
        return AGAIN, ""
    state = json.loads(file.read_text(encoding="utf-8"))
    tried = [(group["kind"], read_trial(group["nodes"], folder / group["log"])) for group in state["groups"]]
    own = [trial for kind, trial in tried if kind == NODE]
    together = [trial for kind, trial in tried if kind == ALL_REDUCE]
    groups = next_groups(well_alone(own, seconds), together) if state["rounds"] < MOST else []
    if groups:
        _plan(folder, state, ALL_REDUCE, groups)
        return AGAIN, ""
    return _end(folder, own, together, needed, seconds, now - state["began"])


def _plan(folder: Path, state: dict, kind: str, groups: Iterable[tuple[str, ...]]) -> None:
    number = state["rounds"] = state.get("rounds", 0) + 1
    new = [
        {
            "kind": kind,
            "nodes": list(group),
            "log": f"{number}_{kind}_{group[0]}{'' if len(group) == 1 else '_and_others'}.log",
        }
        for group in groups
    ]
    state["groups"] += new
    (folder / ROUNDS).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    lines = (f"{kind} {group['log']} {len(group['nodes'])} {','.join(group['nodes'])}\n" for group in new)
    (folder / "groups").write_text("".join(lines), encoding="utf-8")


def _end(
    folder: Path, own: list[Trial], together: list[Trial], needed: int, seconds: float, took: float
) -> tuple[int, str]:
    verdict = judge(own, together, needed, seconds)
    report = verdict.report(needed, took)
    (folder / "report.txt").write_text(report + "\n", encoding="utf-8")
    if not verdict.chosen:
        return 1, report
    (folder / "nodes").write_text(",".join(verdict.chosen) + "\n", encoding="utf-8")
    return 0, report


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the preflight in the attempt's logs")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes that the run needs")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of each round")
    parser.add_argument("--among", required=True, help="the job's nodes, with commas")
    options = parser.parse_args()
    status, text = advance(options.folder, tuple(options.among.split(",")), options.nodes, options.seconds)
    if text:
        print(text, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
