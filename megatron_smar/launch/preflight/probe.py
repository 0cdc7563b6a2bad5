# SPDX-License-Identifier: Apache-2.0
"""The program that the preflight starts on nodes: `python -m megatron_smar.launch.preflight.probe FLAGS -- COMMAND`.

It prints a line of JSON for each finding (`state.Finding`). Output goes through srun and not through files, so that a
node that does not see the folder of logs is heard.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from megatron_smar.launch.command import data_paths, folder_of
from megatron_smar.launch.preflight.collective import all_reduce
from megatron_smar.launch.preflight.local import Request, findings
from megatron_smar.launch.preflight.state import NODE, Finding


def report(finding: Finding) -> None:
    """Prints a finding at once."""
    print(finding.line(), flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="ranks on each node")
    parser.add_argument("--gpus", action="store_true", help="each has a GPU")
    parser.add_argument("--cores", type=int, help="cores that they need")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of a round")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the job's command, after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if os.environ["PREFLIGHT"] != NODE:
        all_reduce(node, options.gpus, options.seconds * 0.8, report)
        return
    request = Request(
        node=node,
        logs=Path(os.environ["PREFLIGHT_FOLDER"]),
        port=int(os.environ["MASTER_PORT"]),
        processes=options.processes,
        gpus=options.gpus,
        cores=options.cores,
        program=None if command[0].startswith("-") else Path(command[0]),
        save=folder_of(command, "--save"),
        data=data_paths(command),
    )
    for finding in findings(request, options.seconds / 4):
        report(finding)
    os._exit(0)  # a check that hangs in a file system would keep the process


if __name__ == "__main__":
    main()
