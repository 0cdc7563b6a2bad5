# SPDX-License-Identifier: Apache-2.0
"""Starts the project's programs in processes forked from one that has imported their modules.

A new interpreter imports for eight seconds of a core before a program does anything, and `make test` starts hundreds of
programs on two cores. Only the imports are shared: each program runs its file as `__main__`, with its own arguments,
environment, folder and process group. What forked processes cannot show (another order of imports, hashes that differ
between ranks) is left to the tests that start new interpreters: tests/slurm, tests/chaos, the recipes, the examples and
all of `make test-matrix`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.conftest import INTERPRETERS, free_port

ROOT = Path(__file__).resolve().parents[1]

# Programs that may be forked, and the modules that are imported beforehand.
PROGRAMS = {
    "pretrain_vlm.py",
    *(f"tools/{name}.py" for name in ("chat", "checkpoint/convert", "evaluate", "placement", "plan", "report")),
    *(f"tools/data/{name}.py" for name in ("add_tokens", "prepare", "rejects")),
    *(f"examples/{name}/run.py" for name in ("emoji_tiny", "smollm2_moe")),
    *(f"benchmarks/{name}.py" for name in ("small_batch_distance", "smar_overhead")),
    *(f"tests/distributed/{name}.py" for name in ("converted", "decoding", "dispatches", "order", "steps")),
    *(f"tests/functional/{name}.py" for name in ("faulty_run", "slow_disk")),
    "tests/unit/model/test_vocabulary.py",
}
IMPORTED = ["pretrain_vlm"]
IMPORTED += [
    f"megatron_smar.commands.{name}"
    for name in ("chat", "convert", "evaluate", "placement", "plan", "prepare", "report")
]
IMPORTED.append("tests.parsed_flags")
MADE = {  # by runtime.install
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TORCHINDUCTOR_CACHE_DIR",
    "ENERGON_LOCAL_COPY_TMP_DIR",
    "THP_MEM_ALLOC_ENABLE",
}
TERMINATION = 30  # seconds from SIGTERM to SIGKILL, as torchrun


def are_off() -> bool:
    """Returns whether every program needs a new interpreter: with --matrix, and with CUDA, which survives no fork."""
    return INTERPRETERS in os.environ or os.environ.get("MEGATRON_SMAR_DEVICE") == "cuda"


def server() -> ForkServerContext:
    """Returns the context of the process that has imported the programs' modules; it starts with the first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def start(
    command: Sequence[str], ranks: int, environment: Mapping[str, str], answers: Connection, output: Connection
) -> tuple[int, Callable[[], int]]:
    """Starts a program of `PROGRAMS`; returns its process's number and a function that waits for its exit status.

    Args:
        command: The program and its arguments.
        ranks: Number of ranks, which end together as under torchrun; 0 for one process without a rank.
        environment: The program's environment.
        answers: Where the program reads its standard input.
        output: Where it writes standard output and standard error.
    """
    process = server().Process(target=_start, args=(list(command), ranks, dict(environment), answers, output))
    process.start()

    def wait() -> int:
        process.join()
        return process.exitcode

    return process.pid, wait


def _start(
    command: list[str], ranks: int, environment: dict[str, str], answers: Connection, output: Connection
) -> None:
    os.setsid()
    for stream, number in ((answers, 0), (output, 1), (output, 2)):
        os.dup2(stream.fileno(), number)
    answers.close(), output.close()
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering=1, closefd=False) for number, mode in enumerate("rww")
    )
    for name in set(os.environ) - set(environment) - MADE:
        del os.environ[name]
    os.environ.update(environment)
    os.chdir(ROOT)
    if ranks:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), WORLD_SIZE=str(ranks))
        _start_ranks(command, ranks)
    else:
        _execute(command)


def _start_ranks(command: list[str], ranks: int) -> None:
    """Forks the ranks, and ends them all when one of them fails."""
    running = set()
    for rank in range(ranks):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _execute(command)
        running.add(child)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(rank, signal.SIGKILL) for rank in running])
    failed = False
    while running:
        child, status = os.wait()
        running.remove(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGTERM)
            signal.alarm(TERMINATION)
    os._exit(failed)


def _execute(command: list[str]) -> None:
    """Runs a program as the interpreter does, from its arguments to its end, and ends this process."""
    sys.argv = command
    sys.path[0] = str((ROOT / command[0]).parent)
    status = 0
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
