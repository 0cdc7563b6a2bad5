# SPDX-License-Identifier: Apache-2.0
"""Runs programs of the project as processes of a step; their output is written to files in the step's folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.context import ROOT, Context, Device

# Variables of a launcher that started this program, and the variable that rounds float32 products to 10 bits.
_DROPPED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


class ProgramError(Exception):
    """A program ended with a nonzero exit status."""


@dataclass(frozen=True)
class Program:
    """One program to run.

    Attributes:
        name: Name of the program's log.
        command: Module (`-m`, name) or file of the project, and its arguments.
        device: Device to run on.
        ranks: Number of processes, each with its own GPU.
        variables: Additional environment variables.
    """

    name: str
    command: Sequence[Any]
    device: Device
    ranks: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)


def base_environment() -> dict[str, str]:
    """Returns this process's environment without the variables that must not reach a step."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, min(8, (os.cpu_count() or 1) // 2))))
    environment.setdefault("MEGATRON_SMAR_ALLOW_UNTESTED", "1")  # the report lists the versions
    return environment


def device_variables(device: Device) -> dict[str, str]:
    """Returns the variables that make a process of the project run on a device; on the CPU they hide all GPUs."""
    return {"MEGATRON_SMAR_DEVICE": device} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def run(context: Context, program: Program) -> str:
    """Runs a program on all its ranks.

    Returns:
        The output of the last rank, which has the losses.

    Raises:
        ProgramError: A rank failed.
    """
    common = base_environment() | device_variables(program.device) | dict(program.variables)
    common |= {"WORLD_SIZE": str(program.ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": _port(program.ranks)}
    logs = [context.folder / f"{program.name}{f'.{rank}' * (program.ranks > 1)}.log" for rank in range(program.ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            # In the step's process group, which is killed when the step ends.
            process = subprocess.Popen(
                [sys.executable, *map(str, program.command)],
                cwd=ROOT,
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    _wait(program, processes, logs)
    return logs[-1].read_text(encoding="utf-8", errors="replace")


def run_together(context: Context, programs: Sequence[Program]) -> list[str]:
    """Runs programs at the same time, since starting takes longer than their work, and returns their outputs.

    Raises:
        ProgramError: One of them failed.
    """
    with ThreadPoolExecutor(len(programs) if (os.cpu_count() or 1) >= 4 else 1) as threads:
        return list(threads.map(lambda program: run(context, program), programs))


def error_line(output: str) -> str:
    """Returns the most informative line of a failed program's output: its exception, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if ("Error: " in line or ": error: " in line) and not line.startswith("File ")]
    return (errors or lines or ["it wrote nothing"])[-1][:400]


def _wait(program: Program, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    """Waits for all ranks; if one fails, kills the others, which would wait for it forever."""
    left = dict(enumerate(processes))
    while left:
        for rank, process in list(left.items()):
            try:
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            del left[rank]
            if process.returncode:
                for other in left.values():
                    other.kill()
                words = error_line(logs[rank].read_text(encoding="utf-8", errors="replace"))
                raise ProgramError(f"{program.name} (exit status {process.returncode}): {words} [{logs[rank]}]")


def _port(ranks: int) -> str:
    """Returns the rendezvous port; a single rank uses port 0, any free port, so that no other process can take it."""
    if ranks == 1:
        return "0"
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def read_json(path: Path) -> Any:
    """Reads a JSON file that a program wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
