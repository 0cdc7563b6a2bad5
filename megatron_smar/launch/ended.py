# SPDX-License-Identifier: Apache-2.0
"""What a job does when its ranks have ended: it reports the first error, and decides whether to run again.

    python -m megatron_smar.launch.ended LOGS/JOB/attempt_N --status STATUS [--save CHECKPOINTS] [--then requeue]

The sbatch file of `launch.script` runs it. Exits with 0 if the job is to be requeued, else with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_smar.launch import attempts
from megatron_smar.launch.first_error import endings, first_error, first_failure

STOPPED = {128 + 15: "SIGTERM", 128 + 10: "SIGUSR1", 128 + 2: "SIGINT"}
REQUEUE, CHAIN, END = "requeue", "chain", "end"  # what follows an attempt that is not complete


def decide(
    folder: Path, status: int, save: Path | None, then: str = END, marker: Path | None = None
) -> tuple[bool, str]:
    """Decides whether the job runs again, and records the attempt.

    Args:
        folder: The attempt's folder; its parent keeps the history of the job's attempts.
        status: The exit status of the first rank that failed, else of all.
        save: Folder of the run's checkpoints; None if it has none.
        then: What follows an attempt that is not complete: requeue, chain or end.
        marker: File that will say that the run is complete, if it is.

    Returns:
        Whether it runs again, and why, in one sentence.
    """
    history = attempts.end(folder, save, status) if save is not None else []
    if status == 0:
        if marker is not None:
            when = f"job {folder.parent.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
            marker.write_text(when + "\n", encoding="utf-8")
        return False, "the job is complete"
    how = f"was stopped by {STOPPED[status]}" if status in STOPPED else f"failed with status {status}"
    if save is None or then == END:
        return False, f"the job {how}; it is not requeued"
    step = attempts.step_in(save)
    where = f"at step {step} in {save}" if step else f"without a checkpoint in {save}"
    if attempts.stuck(history, step):
        so = "it is not requeued" if then == REQUEUE else "the chain ends"
        return False, f"the job {how}, {where}; its last {attempts.ATTEMPTS} attempts made no checkpoint, so {so}"
    if then == CHAIN:
        return False, f"the job {how}, {where}; the next job of its chain continues, if there is one"
    return True, f"the job {how}, {where}; it is requeued"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the logs of the attempt's ranks")
    parser.add_argument("--status", type=int, required=True, help="exit status of the ranks")
    parser.add_argument("--save", type=Path, help="folder of the run's checkpoints")
    parser.add_argument(
        "--then", choices=(REQUEUE, CHAIN, END), default=END, help="what follows (default: %(default)s)"
    )
    parser.add_argument("--marker", type=Path, help="file that will say that the run is complete")
    options = parser.parse_args()
    ended = endings(options.folder)
    failed = first_failure(ended[0]) if options.status else None
    status = failed.status if failed else options.status
    if status and status not in STOPPED and (ended[0] or ended[1]):  # a preflight has said its faults
        error = first_error(options.folder)
        print(error or f"no rank says why the job failed; see {options.folder} and the job's own log", flush=True)
    again, why = decide(options.folder, status, options.save, options.then, options.marker)
    print(f"megatron-smar-launch: {why}.", flush=True)
    sys.exit(0 if again else 1)


if __name__ == "__main__":
    main()
