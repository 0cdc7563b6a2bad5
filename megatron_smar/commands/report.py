# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a run, or the comparison of several runs, to read and as JSON, and a table on the terminal.

    python tools/report.py RUN [--results results.json] [--before before.json] [--output FOLDER]
    python tools/report.py --compare RUN RUN ... [--output FOLDER]

RUN is the run's --save folder (or its --tensorboard-dir, which leaves the settings out), or its run.yaml. report.html
shows losses, the distance of each layer with the band, the experts' load, throughput, skipped samples, settings, and
results of evaluate.py with those on benchmarks and tasks: after the run (by default RUN/results.json) and, with
--before, before it.

With --compare, RUN may also be a results file of evaluate.py, and NAME=RUN names a run, which otherwise has the name
of its folder. comparison.html shows the scores on benchmarks and tasks with the best of each in bold, the distance by
layer with a curve for each run and a panel for each benchmark (with the bands of the runs' flags), heat maps of the
experts' shares of text and vision tokens, and the loss and mean distance over the training. Each is shown if at least
one run has it, and names the runs that do not. The figures are also written as PNG and SVG.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # it only reads files

from megatron_smar.config.run_file import saved_folder
from megatron_smar.report.comparison import format_comparison, read_runs, write_comparison
from megatron_smar.report.run import format_summary, read_run, write_run_report

COMPARISON = Path("runs/comparison")


def parser_of() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the run's folder")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="runs or results files to compare, or NAME=RUN")
    one = parser.add_argument_group("of one run")
    one.add_argument("--tensorboard-dir", type=Path, help="default: RUN, RUN/tensorboard, or the run's own")
    one.add_argument(
        "--results", type=Path, help="results of evaluate.py after the run. Default: RUN/results.json, if it exists"
    )
    one.add_argument("--before", type=Path, help="results of evaluate.py before the run")
    one.add_argument("--image-root", type=Path, help="as for evaluate.py, to show the examples' images")
    parser.add_argument("--output", type=Path, help=f"folder of the report. Default: RUN; with --compare: {COMPARISON}")
    return parser


def report(options: argparse.Namespace) -> None:
    """Writes the report of one run, and prints its summary."""
    folder = options.run if options.run.suffix not in (".yaml", ".yml") else saved_folder(options.run)
    run = read_run(folder, options.tensorboard_dir, options.results, options.before, options.image_root)
    _, page = write_run_report(run, options.output or folder)
    print(f"{format_summary(run)}\n\nreport: {page}")


def compare(options: argparse.Namespace) -> None:
    """Writes the comparison of several runs, and prints the table of their scores."""
    for name in ("run", "tensorboard_dir", "results", "before", "image_root"):
        if getattr(options, name) is not None:
            given = f"--{name.replace('_', '-')}" if name != "run" else str(options.run)
            raise ValueError(f"{given} is for the report of one run: leave it out, or name the runs after --compare.")
    runs = read_runs(options.compare)
    page, *others = write_comparison(runs, options.output or COMPARISON)
    text = format_comparison(runs, shutil.get_terminal_size().columns, sys.stdout.isatty())
    figures = ", ".join(path.name for path in others if path.suffix == ".png")
    print(f"{text}\n\ncomparison: {page}\nfigures: {figures}, also as SVG".lstrip())


def main() -> None:
    """Reads the runs and writes the report; a user's mistake ends it with one sentence."""
    parser = parser_of()
    options = parser.parse_args()
    try:
        if options.output is not None and options.output.exists() and not options.output.is_dir():
            raise ValueError(f"{options.output} is not a folder: give --output another path.")
        if options.compare:
            compare(options)
        elif options.run:
            report(options)
        else:
            raise ValueError("RUN is missing: give a run's folder, or --compare with several runs.")
    except ValueError as error:
        parser.error(str(error))
    sys.exit(0)


if __name__ == "__main__":
    main()
