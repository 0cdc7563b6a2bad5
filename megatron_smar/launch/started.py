# SPDX-License-Identifier: Apache-2.0
"""What a job does when an attempt starts: it ends at once if there is nothing to do, or no use in trying.

    python -m megatron_smar.launch.started LOGS/JOB/attempt_N --save CHECKPOINTS --marker FILE [--after afterany:JOB]

The sbatch file of `launch.script` runs it. Exits with 0 if the attempt continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_smar.launch import attempts
from megatron_smar.launch.first_error import lost

COMPLETE, STOPPED = 3, 4  # exit statuses


def start(folder: Path, save: Path, marker: Path, after: str) -> tuple[int, str]:
    """Begins an attempt, unless the run is complete or has stopped making progress.

    Args:
        folder: The attempt's folder.
        save: Folder of the run's checkpoints.
        marker: File that says that the run is complete, if it is.
        after: The job's dependency in SLURM's form; "" without one.

    Returns:
        The exit status, and what to print.
    """
    if marker.is_file():
        said = marker.read_text(encoding="utf-8").strip()
        return COMPLETE, f"the run is complete ({said}): nothing to do. Remove {marker} to run it again."
    history = attempts.begin(folder, save, after)
    step = attempts.step_in(save)
    if attempts.stuck(history, step):
        last = history[-attempts.ATTEMPTS :]
        jobs = list(dict.fromkeys(attempt.job for attempt in last))
        return STOPPED, (
            f"the last {len(last)} attempts at this run made no checkpoint, so it does not start: read their first "
            f"errors in the logs of {'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}, and submit again."
        )
    if history and history[-1].status is None:
        before = folder.parent.parent / history[-1].job / history[-1].attempt
        return 0, f"the attempt before ({before}) has no end: SLURM ended it, or a node was lost{lost(before)}."
    return 0, ""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the logs of the attempt's ranks")
    parser.add_argument("--save", type=Path, required=True, help="folder of the run's checkpoints")
    parser.add_argument("--marker", type=Path, required=True, help="file that says that the run is complete")
    parser.add_argument("--after", default="", help="the job's dependency")
    options = parser.parse_args()
    status, text = start(options.folder, options.save, options.marker, options.after)
    if text:
        print(f"megatron-smar-launch: {text}", flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
