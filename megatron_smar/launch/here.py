# SPDX-License-Identifier: Apache-2.0
"""A run on this machine, or this machine's part of a run on several without SLURM: torchrun with the command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PORT = "29500"  # torchrun's own
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def torchrun(nodes: int, processes: int, environment: Mapping[str, str]) -> list[str]:
    """Returns the words that start torchrun on this node.

    Args:
        nodes: Number of nodes of the run.
        processes: Ranks on each node.
        environment: Has NODE_RANK and MASTER_ADDR (and MASTER_PORT) where there are several nodes.

    Raises:
        ValueError: A number is below 1, or a variable is missing; the message is one sentence.
    """
    for name, value in (("nodes", nodes), ("processes-per-node", processes)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; give 1 or more.")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1:
        return [*words, "--standalone"]
    rank, address = environment.get("NODE_RANK", ""), environment.get("MASTER_ADDR", "")
    if not rank or not address:
        raise ValueError(
            f"the run needs {nodes} nodes: submit it to SLURM, or start it on each node with NODE_RANK and MASTER_ADDR "
            "set."
        )
    if not rank.isdecimal() or int(rank) >= nodes:
        raise ValueError(f"NODE_RANK is {rank}; give a number from 0 to {nodes - 1}.")
    place = ["--node-rank", rank, "--master-addr", address, "--master-port", environment.get("MASTER_PORT") or PORT]
    return [*words, "--nnodes", str(nodes), *place]


def threads_of_each(processes: int) -> int:
    """Returns the cores of each rank, where all ranks of this machine share those that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def run(words: Sequence[str], log: Path | None) -> int:
    """Runs a command, with its output on the terminal and, if wanted, in a file too.

    Signals that end this process reach the command, which saves and ends by itself.

    Args:
        words: The command.
        log: File that the output is added to; None for the terminal alone.

    Returns:
        Its exit status; 128 + the signal for a command that a signal killed.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    output: dict[str, Any] = {} if log is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    _write(f"{shlex.join(words)}\n".encode(), log)
    with subprocess.Popen(words, **output) as child:
        for number in PASSED_ON:
            signal.signal(number, lambda received, _: child.send_signal(received))
        if os.isatty(0):  # Ctrl-C reaches the command by itself
            signal.signal(signal.SIGINT, lambda *_: None)
        if log is not None:
            _copy(child, log)
        status = child.wait()
    return status if status >= 0 else 128 - status


def _copy(child: subprocess.Popen[bytes], log: Path) -> None:
    """Copies what the command writes, as it is written."""
    assert child.stdout is not None
    while part := os.read(child.stdout.fileno(), 65536):
        _write(part, log)


def _write(part: bytes, log: Path | None) -> None:
    sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
    if log is not None:
        with log.open("ab") as file:
            file.write(part)
