# SPDX-License-Identifier: Apache-2.0
r"""Measures how the speed of training grows with processes, batch size, or any flag.

    python tools/scaling.py runs/scaling --processes 1 2 4 --mode weak -- pretrain_vlm.py FLAGS ...
    python tools/scaling.py runs/smar --vary modality-routing=none,smar --vary micro-batch-size=1,2 -- COMMAND ...
    python tools/scaling.py runs/scaling --processes 8 16 64 --slurm='--time 0:20:00' -- pretrain_vlm.py FLAGS ...
    python tools/scaling.py runs/scaling

Every combination of --processes and the values of --vary is a run of --steps steps without checkpoints, of which the
first --warm-up are left out. With --mode strong all runs have the --global-batch-size of the command; with --mode weak
that is the batch of the smallest number of processes, and it grows with them. Results are what the runs log
(docs/scaling.md): tokens, samples and tiles per second and TFLOP/s per device, the medians over steps.

The runs go one after another on this machine, or with --slurm as job arrays, one for each number of nodes. Started
again, the program only does what is missing. Without a command it draws the results that are there: a table on the
terminal, scaling.json, and scaling.svg in the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install_or_exit("cpu")

from megatron_smar.config.run_file import expand
from megatron_smar.launch import here
from megatron_smar.launch.command import folder_of, split, values
from megatron_smar.launch.sweep import name_of
from megatron_smar.report.figures import new_figure
from megatron_smar.report.numbers import aligned
from megatron_smar.report.scalars import read_scalars
from megatron_smar.runtime.environment import environment_with_gpus

RATES = ("tokens_per_second", "samples_per_second", "tiles_per_second", "model_tflops")
LAUNCH = [sys.executable, "-m", "megatron_smar.commands.launch"]


@dataclass(frozen=True)
class Point:
    """A run of the experiment.

    Attributes:
        processes: Number of ranks.
        varied: Values of the varied flags by name.
        words: Flags that are added to the command.
        folder: The run's folder.
    """

    processes: int
    varied: dict[str, str]
    words: tuple[str, ...]
    folder: Path

    @property
    def line(self) -> str:
        """What the results of different numbers of processes have in common, for the figure's legend."""
        return ", ".join(f"{name} {value}" for name, value in self.varied.items()) or "all"


@dataclass(frozen=True)
class Result:
    """What a run has measured: medians over its steps.

    Attributes:
        processes: Number of ranks.
        line: See `Point.line`.
        rates: Of all ranks per second, and TFLOP/s of each, by name.
        quartiles: Lower and upper quartile of the tokens per second.
        steps: Number of steps.
    """

    processes: int
    line: str
    rates: dict[str, float]
    quartiles: tuple[float, float]
    steps: int


def varied_flags(given: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Returns the values of each varied flag.

    Args:
        given: Words NAME=VALUE,VALUE.

    Raises:
        ValueError: A word is not of that form.
    """
    found = []
    for word in given:
        name, equals, values = word.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise ValueError(f"--vary {word} has no values; give NAME=VALUE,VALUE with NAME a flag without its dashes.")
        found.append([(name.removeprefix("--"), value) for value in values.split(",")])
    return found


def points(options: argparse.Namespace, command: Sequence[str]) -> list[Point]:
    """Returns the runs of the experiment.

    Raises:
        ValueError: The options describe none.
    """
    flags = expand(command[1:])
    if folder_of(flags, "--save") is not None:
        raise ValueError(
            "the command has --save, and runs that are measured save no checkpoints: leave it out (--unset save, if it "
            "is in a run file)."
        )
    batch = next((int(value) for value in reversed(list(values(flags, "--global-batch-size")))), None)
    least = min(options.processes)
    found = []
    for processes, chosen in itertools.product(options.processes, itertools.product(*varied_flags(options.vary))):
        varied = dict(chosen)
        words = [word for name, value in varied.items() for word in (f"--{name}", value)]
        if options.mode == "weak" and "global-batch-size" not in varied:
            if batch is None:
                raise ValueError(
                    "--mode weak needs --global-batch-size in the command; it is the smallest run's batch."
                )
            if batch * processes % least:
                raise ValueError(f"--global-batch-size {batch} cannot grow from {least} to {processes} processes.")
            words += ["--global-batch-size", str(batch * processes // least)]
        folder = options.folder.resolve() / name_of([f"{processes}_processes", *words])
        words += ["--train-iters", str(options.steps), "--log-interval", "1", "--tensorboard-log-interval", "1"]
        words += ["--eval-iters", "0", "--tensorboard-dir", str(folder / "tensorboard")]
        found.append(Point(processes, varied, tuple(words), folder))
    return found


def result_of(point: Point, warm_up: int) -> Result | None:
    """Returns what a run has measured; None if it has not ended, or has not begun."""
    tensorboard = point.folder / "tensorboard"
    scalars = read_scalars(tensorboard) if tensorboard.is_dir() else {}
    wanted = int(point.words[point.words.index("--train-iters") + 1])
    series = {rate: scalars.get(f"throughput/{rate}") for rate in RATES}
    tokens = series["tokens_per_second"]
    if tokens is None or tokens.steps[-1] < wanted:
        return None
    rates = {rate: statistics.median(found.values[warm_up:]) for rate, found in series.items() if found is not None}
    lower, _, upper = statistics.quantiles(tokens.values[warm_up:], n=4, method="inclusive")
    return Result(point.processes, point.line, rates, (lower, upper), len(tokens.values) - warm_up)


def run_here(missing: Sequence[Point], command: Sequence[str]) -> None:
    """Runs the missing runs one after another.

    Raises:
        ValueError: A run failed; its output is in its folder.
    """
    begin = time.monotonic()
    for number, point in enumerate(missing):
        eta = (time.monotonic() - begin) / number * (len(missing) - number) if number else None
        ahead = "" if eta is None else f", ETA {eta / 60:.0f} min"
        print(f"run {number + 1} of {len(missing)}{ahead}: {point.processes} processes, {point.line}", flush=True)
        point.folder.mkdir(parents=True, exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(here.threads_of_each(point.processes))
        words = [*here.torchrun(1, point.processes, {}), *command, *point.words]
        with (point.folder / "log.txt").open("w", encoding="utf-8") as log:
            log.write(f"{shlex.join(words)}\n")
            log.flush()
            environment = environment_with_gpus() | {"OMP_NUM_THREADS": threads}
            status = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
        if status:
            raise ValueError(f"the run failed with status {status}; its output is in {point.folder / 'log.txt'}.")


def submit(missing: Sequence[Point], command: Sequence[str], options: argparse.Namespace) -> None:
    """Submits the missing runs as job arrays, one for each number of nodes; returns when they are submitted.

    Raises:
        ValueError: A number of processes is no number of whole nodes, or sbatch refuses the job.
    """
    for processes, of_size in itertools.groupby(missing, key=lambda point: point.processes):
        each = min(processes, options.processes_per_node)
        if processes % each:
            raise ValueError(f"{processes} processes do not fill nodes of {options.processes_per_node}.")
        jobs = options.folder.resolve() / f"jobs_{processes}"
        jobs.mkdir(parents=True, exist_ok=True)
        lines = [shlex.join(point.words) for point in of_size]
        (jobs / "sweep.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        words = [*LAUNCH, "slurm", "--nodes", str(processes // each), "--processes-per-node", str(each), "--no-requeue"]
        words += ["--logs", str(jobs), "--array", str(jobs / "sweep.txt"), *shlex.split(options.slurm)]
        status = subprocess.run([*words, "--", *command], env=environment_with_gpus()).returncode
        if status:
            raise ValueError(f"the job of {processes} processes was not submitted (status {status}).")


def efficiency(result: Result, results: Sequence[Result]) -> float:
    """Returns the tokens per second and process, relative to the smallest run with the same flags."""
    first = min((other for other in results if other.line == result.line), key=lambda other: other.processes)
    each = [one.rates["tokens_per_second"] / one.processes for one in (result, first)]
    return each[0] / each[1]


def table(results: Sequence[Result]) -> str:
    """Returns the results for the terminal."""
    names = ["tokens/s", "quartiles", "samples/s", "tiles/s", "TFLOP/s each", "efficiency", "steps"]
    rows = [["processes", "run", *names]]
    for result in results:
        tokens, samples, tiles, tflops = (result.rates.get(rate, 0.0) for rate in RATES)
        lower, upper = result.quartiles
        shown = [f"{tokens:.1f}", f"{lower:.1f}..{upper:.1f}", f"{samples:.2f}", f"{tiles:.2f}", f"{tflops:.3g}"]
        rows.append(
            [str(result.processes), result.line, *shown, f"{efficiency(result, results):.2f}", str(result.steps)]
        )
    return "\n".join(aligned([tuple(row) for row in rows], left=(1,)))


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws tokens per second over processes, with a line for runs with the same flags, and the ideal one."""
    figure = new_figure(480, 320)
    axes = figure.subplots()
    for line in dict.fromkeys(result.line for result in results):
        own = sorted((r for r in results if r.line == line), key=lambda result: result.processes)
        x, y = [r.processes for r in own], [r.rates["tokens_per_second"] for r in own]
        below = [value - result.quartiles[0] for value, result in zip(y, own, strict=True)]
        above = [result.quartiles[1] - value for value, result in zip(y, own, strict=True)]
        drawn = axes.errorbar(x, y, [below, above], marker="o", label=line)
        axes.plot(x, [y[0] * n / x[0] for n in x], linestyle=":", color=drawn[0].get_color())
    axes.set(xlabel="processes", ylabel="tokens per second", ylim=(0, None))
    axes.set_xticks(sorted({result.processes for result in results}))
    axes.legend(frameon=False)
    figure.savefig(path)


def report(folder: Path, warm_up: int, runs: Sequence[Point]) -> None:
    """Prints and draws what has been measured, and says how many runs have not."""
    found = [(point, result_of(point, warm_up)) for point in runs]
    results = [result for _, result in found if result is not None]
    if results:
        print(table(results))
        (folder / "scaling.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
        draw(results, folder / "scaling.svg")
        print(f"Written: {folder / 'scaling.json'}, {folder / 'scaling.svg'}; dotted lines: ideal scaling")
    if left := len(found) - len(results):
        print(f"{left} of {len(found)} runs are not complete.")


def experiment(options: argparse.Namespace, command: list[str]) -> tuple[list[str], list[Point]]:
    """Returns the command and the runs of the folder's experiment; a new one is stored there once it can be run.

    Args:
        options: The command line; takes the values of a stored experiment.
        command: The command after the `--`; empty for that of the stored experiment.

    Raises:
        ValueError: There is no experiment, another one, or one that cannot be run.
    """
    file = options.folder / "experiment.json"
    given = {name: getattr(options, name) for name in ("processes", "mode", "vary", "steps", "warm_up")}
    given["command"] = command
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if command and stored != given:
            raise ValueError(f"{options.folder} has another experiment ({file}); give another folder.")
        vars(options).update(stored)
    elif not command:
        raise ValueError(
            f"{options.folder} has no experiment; give a command after --, as in -- pretrain_vlm.py FLAGS."
        )
    command = command or options.command
    runs = points(options, command)
    if not file.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
    return command, runs


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="folder of the runs and of the results")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    parser.add_argument("--mode", choices=("weak", "strong"), default="strong", help="default: %(default)s")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE", help="flags to vary")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=5, help="of them left out (default: %(default)s)")
    parser.add_argument(
        "--slurm", nargs="?", const="", metavar="OPTIONS", help="as job arrays, with options of launch.py slurm"
    )
    parser.add_argument("--processes-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, and reports."""
    own, command = split(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    options: Any = parser.parse_args(own)
    try:
        if options.warm_up < 0 or options.steps - options.warm_up < 2:
            raise ValueError(f"--steps {options.steps} and --warm-up {options.warm_up} leave nothing to measure.")
        if min(options.processes) < 1:
            raise ValueError(f"--processes {min(options.processes)} is below 1.")
        is_given = bool(command)
        command, runs = experiment(options, command)
        missing = [point for point in runs if result_of(point, options.warm_up) is None]
        if missing and options.slurm is not None:
            submit(missing, command, options)
        elif missing and is_given:
            run_here(missing, command)
        report(options.folder, options.warm_up, runs)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
