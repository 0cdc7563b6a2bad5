# SPDX-License-Identifier: Apache-2.0
"""What a job does when its ranks have ended: it reports the first error, and decides whether to run again.

    python -m megatron_smar.launch.ended LOGS/JOB/attempt_N --status STATUS [--save CHECKPOINTS]

The sbatch file of `launch.script` runs it. Exits with 0 if the job is to be requeued, else with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_smar.launch.first_error import endings, first_error, first_failure

# Attempts in a row that may end without a new checkpoint; after the last the job is not requeued.
ATTEMPTS = 3
STOPPED = {128 + 15: "SIGTERM", 128 + 10: "SIGUSR1", 128 + 2: "SIGINT"}
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, in the folder of a run's checkpoints
STARTED = "started_from"  # the tracker's copy when an attempt began, in the attempt's folder


def step_in(tracker: Path) -> str:
    """Returns the step that Megatron's tracker file names, `release` for an import, or "" without the file."""
    return tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""


def decide(folder: Path, status: int, save: Path | None) -> tuple[bool, str]:
    """Decides whether the job runs again, and records the attempt.

    Args:
        folder: The attempt's folder; its parent keeps the history of the job's attempts.
        status: The exit status of the first rank that failed, else of all.
        save: Folder of the run's checkpoints; None if the job is not requeued.

    Returns:
        Whether it runs again, and why, in one sentence.
    """
    if status == 0:
        return False, "the job is complete"
    how = f"was stopped by {STOPPED[status]}" if status in STOPPED else f"failed with status {status}"
    if save is None:
        return False, f"the job {how}; it is not requeued"
    step, file = step_in(save / TRACKER), folder.parent / "attempts.json"
    history = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    history.append({"attempt": folder.name, "status": status, "from": step_in(folder / STARTED), "to": step})
    file.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    where = f"at step {step} in {save}" if step else f"without a checkpoint in {save}"
    last = history[-ATTEMPTS:]
    if len(last) == ATTEMPTS and all(entry["from"] == entry["to"] for entry in last):
        return False, f"the job {how}, {where}; its last {ATTEMPTS} attempts made no checkpoint, so it is not requeued"
    return True, f"the job {how}, {where}; it is requeued"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the logs of the attempt's ranks")
    parser.add_argument("--status", type=int, required=True, help="exit status of the ranks")
    parser.add_argument("--save", type=Path, help="folder of the run's checkpoints")
    options = parser.parse_args()
    failed = first_failure(endings(options.folder)[0]) if options.status else None
    status = failed.status if failed else options.status
    if status and status not in STOPPED:
        error = first_error(options.folder)
        print(error or f"no rank says why the job failed; see {options.folder} and the job's own log", flush=True)
    again, why = decide(options.folder, status, options.save)
    print(f"megatron-smar-launch: {why}.", flush=True)
    sys.exit(0 if again else 1)


if __name__ == "__main__":
    main()
