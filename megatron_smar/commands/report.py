# SPDX-License-Identifier: Apache-2.0
"""Writes the report of a run: report.html to read, report.json for programs, and a table on the terminal.

    python tools/report.py RUN [--results results.json] [--before before.json] [--output FOLDER]

RUN is the run's --save folder (or its --tensorboard-dir, which leaves the settings out), or its run.yaml. The page
shows losses, the distance of each layer with the band, the experts' load, throughput, skipped samples, settings, and
results of evaluate.py: those after the run (by default RUN/results.json) and, with --before, those before it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_smar import runtime

runtime.install_or_exit("cpu")  # it only reads files

from megatron_smar.config.run_file import saved_folder
from megatron_smar.report.run import format_summary, read_run, write_run_report


def main() -> None:
    """Reads the run and writes its report; a user's mistake ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--tensorboard-dir", type=Path, help="default: RUN, RUN/tensorboard, or the run's own")
    parser.add_argument(
        "--results", type=Path, help="results of evaluate.py after the run. Default: RUN/results.json, if it exists"
    )
    parser.add_argument("--before", type=Path, help="results of evaluate.py before the run")
    parser.add_argument("--image-root", type=Path, help="as for evaluate.py, to show the examples' images")
    parser.add_argument("--output", type=Path, help="folder of the report. Default: RUN")
    options = parser.parse_args()
    try:
        folder = options.run if options.run.suffix not in (".yaml", ".yml") else saved_folder(options.run)
        run = read_run(folder, options.tensorboard_dir, options.results, options.before, options.image_root)
        _, page = write_run_report(run, options.output or folder)
    except ValueError as error:
        parser.error(str(error))
    print(format_summary(run))
    print(f"\nreport: {page}")
    sys.exit(0)


if __name__ == "__main__":
    main()
