# SPDX-License-Identifier: Apache-2.0
"""Runs what is missing of the study, two runs at a time, and keeps one small file of each.

    python examples/study/run.py [--part tuning|main] [--arms none smar ...] [--seeds 1 2 ...] [--hours 2]
    python examples/study/run.py --list
    python examples/study/run.py --slurm='--time 1:00:00 --cpus-per-process 1'
    MEGATRON_SMAR_DEVICE=cuda python examples/study/run.py --smollm2

The grid is in grid.yaml; with --smollm2 it is grid_smollm2.yaml, and the model SmolLM2 as a mixture. A run is one
process with one thread: stage 2 from the checkpoint of its model and seed, and its measures. Results are in
docs/study/results; a run that has one with the same settings is not done again, a failed one only with --retry. With
--slurm the runs are a job array, in a folder that all nodes share.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "examples" / name) for name in ("study", "emoji_tiny", "smollm2_moe"))]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # this process only parses flags

from backbones import BACKBONES
from grid import MAIN, PLACES, TUNING, Run, add_places, read_grid, set_places
from pool import run_here
from steps import StepError
from study_data import Data

import megatron_smar.commands.evaluate  # noqa: F401
import pretrain_vlm  # noqa: F401  (what forks run)
from megatron_smar.runtime.environment import environment_with_gpus
from runs import Study

PROGRAM = "examples/study/run.py"
LAUNCH = [sys.executable, str(ROOT / "tools/launch.py"), "slurm"]
ALONE = {
    "MEGATRON_SMAR_DEVICE": "cpu",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


def study_of(options: argparse.Namespace) -> Study:
    """Returns the study in the folders that the options name.

    Raises:
        ValueError: The grid cannot be read.
    """
    grid = read_grid(options.grid)
    data = Data(options.output / "data", options.cache, grid.data)
    return Study(BACKBONES[grid.backbone](grid, data, options.output), options.results)


def chosen(study: Study, options: argparse.Namespace) -> list[Run]:
    """Returns the runs that the options name.

    Raises:
        ValueError: There are none.
    """
    found = [
        run
        for run in study.backbone.grid.runs()
        if (options.only is None or run.name == options.only)
        and (options.part is None or run.part == options.part)
        and (options.models is None or run.model in options.models)
        and (options.arms is None or run.arm in options.arms or run.arm.split("__")[0] in options.arms)
        and (options.seeds is None or run.seed in options.seeds)
    ]
    if not found:
        raise ValueError(f"{options.grid} has no such run; --list shows all of them.")
    return found


def missing(study: Study, runs: Sequence[Run], retry: bool) -> list[Run]:
    """Returns the runs without a result; with `retry` those that failed too."""
    results = [(run, study.result(run)) for run in runs]
    return [run for run, result in results if result is None or (retry and "failed" in result)]


def state(study: Study, run: Run) -> str:
    """Returns `done`, `failed`, or nothing for a run without a result."""
    result = study.result(run)
    return "" if result is None else "failed" if "failed" in result else "done"


def submit(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Submits the runs as a job array."""
    jobs = options.output.resolve() / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    sweep = jobs / "sweep.txt"
    retry = " --retry" if options.retry else ""
    sweep.write_text("".join(f"--only {run.name}{retry}\n" for run in runs), encoding="utf-8")
    words = ["--nodes", "1", "--processes-per-node", "1", "--no-requeue", "--logs", str(jobs), "--array", str(sweep)]
    words += [] if os.environ["MEGATRON_SMAR_DEVICE"] == "cuda" else ["--cpu"]
    shared = [word for name in PLACES for word in (f"--{name}", getattr(options, name))]
    command = [*LAUNCH, *words, *shlex.split(options.slurm), "--", PROGRAM, *map(str, shared)]
    if subprocess.run(command, cwd=ROOT, env=environment_with_gpus()).returncode:
        raise ValueError("the job array was not submitted; the reason is above.")


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(TUNING, MAIN), help="one part of the grid (default: both)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: all")
    parser.add_argument("--only", metavar="RUN", help="one run, by its name in --list")
    parser.add_argument("--list", action="store_true", help="show the runs, and end")
    parser.add_argument("--retry", action="store_true", help="do runs that failed again")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--slurm", metavar="OPTIONS", help="as a job array, with options of launch.py slurm")
    add_places(parser, *PLACES)
    return parser


def main() -> None:
    """Runs the command line."""
    parser = make_parser()
    options = parser.parse_args()
    set_places(options)
    os.chdir(ROOT)
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        study = study_of(options)
        runs = chosen(study, options)
        left = missing(study, runs, options.retry)
        if options.list:
            print("\n".join(f"{run.name}  {state(study, run)}".rstrip() for run in runs))
            return
        if study.backbone.grid.layout == "gpu" and os.environ["MEGATRON_SMAR_DEVICE"] == "cpu":
            raise ValueError(f"{options.grid} is for a GPU, on the CPU it takes weeks: set MEGATRON_SMAR_DEVICE=cuda.")
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done")
        study.backbone.prepare()
        if options.slurm is not None and left:
            submit(left, options)
            return
        if failures := run_here(study, left, options.processes, options.hours, options.retry):
            sys.exit(f"study: {failures} runs failed; their logs are in {options.output}.")
        if remaining := missing(study, runs, False):
            print(f"{len(remaining)} of {len(runs)} runs are left; the same command continues.")
    except (StepError, ValueError) as error:
        sys.exit(f"study: {error}")


if __name__ == "__main__":
    main()
