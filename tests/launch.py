# SPDX-License-Identifier: Apache-2.0
"""Runs the project's programs like a user, and reads their results."""

import contextlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests import forked
from tests.conftest import free_port
from tests.forked import ROOT

# A model like Mixtral in everything but size; every flag is Megatron's.
SMALL_MODEL = """
    --image-size 32 --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --num-experts 4 --moe-router-topk 2
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --seq-length 128 --max-position-embeddings 128 --make-vocab-size-divisible-by 64 --seed 7
""".split()

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # a rank's environment

TWO_STEPS = ["--micro-batch-size", "4", "--global-batch-size", "8", "--train-iters", "2", "--num-workers", "0"]


def users_environment() -> dict[str, str]:
    """Returns the environment without the variables of the tests' own process group, which a program would join."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED}


def run(
    *command: Any,
    ranks: int = 0,
    timeout: int = 240,
    idle: int | None = None,
    check: bool = True,
    rank: Mapping[str, str] | None = None,
    answers: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the project, in one process or in several under torchrun.

    Args:
        *command: The program and its arguments.
        ranks: Number of processes under torchrun; 0 for one process without torchrun.
        timeout: Seconds after which the program is killed with all its ranks, and fails.
        idle: If given, the program is killed after this many seconds without output, instead of after `timeout`.
        check: Whether a failure raises AssertionError.
        rank: Further variables of the environment, such as a rank's.
        answers: The program's standard input.

    Returns:
        The finished process; its output has standard output and standard error together.
    """
    common = users_environment() | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MEGATRON_SMAR_DEVICE": os.environ.get("MEGATRON_SMAR_DEVICE", "cpu"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }
    environment = common | dict(rank or {})
    words = [str(word) for word in command]
    # Variables that are read before or during the imports need an interpreter of their own.
    changed = {name for name, value in environment.items() if common.get(name) != value}
    own = changed - {*LAUNCHED} or forked.are_off()
    start = _start_interpreter if own or words[0] not in forked.PROGRAMS else forked.start
    (reads, answering), (reading, writes) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
    number, wait = start(words, ranks, environment, reads, writes)
    reads.close(), writes.close()
    with contextlib.suppress(BrokenPipeError), answering:
        os.write(answering.fileno(), answers.encode())
    output, end = bytearray(), time.monotonic() + timeout
    events = select.poll()  # select.select would take none of the thousands of descriptors that unit tests leave open
    events.register(reading, select.POLLIN | select.POLLHUP)
    while True:
        left = idle or end - time.monotonic()  # beyond the timeout it is a hang, even if output is still written
        readable = left > 0 and events.poll(1000 * left)
        chunk = os.read(reading.fileno(), 1 << 16) if readable else b""
        output += chunk
        if not chunk:
            break
    hung = not readable
    if hung:
        os.killpg(number, signal.SIGKILL)  # also the ranks, which would otherwise keep waiting for each other
    reading.close()
    done = subprocess.CompletedProcess(words, wait(), output.decode(errors="replace"))
    if check and (hung or done.returncode):
        raise AssertionError(f"{command[0]} {'hung' if hung else 'failed'}:\n{done.stdout[-6000:]}")
    return done


def _start_interpreter(
    command: list[str], ranks: int, environment: dict[str, str], answers: Connection, output: Connection
) -> tuple[int, Callable[[], int]]:
    """Starts a program as a user does; see `forked.start`."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    process = subprocess.Popen(
        [sys.executable, *launch, *command],
        cwd=ROOT,
        env=environment,
        stdin=answers.fileno(),
        stdout=output.fileno(),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process.pid, process.wait


def run_each_rank(*command: Any, ranks: int, **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """Runs a program in several processes as srun starts them, each until it ends, and returns each process's output.

    torchrun kills the other ranks as soon as one rank fails, so only this way shows what each rank writes.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}

    def run_one(rank: int) -> subprocess.CompletedProcess[str]:
        return run(*command, rank=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(run_one, range(ranks)))


def on_two_ranks(function: Callable[..., None], folder: Path) -> dict[Any, Any]:
    """Returns the results of two processes that run `function(rank, store, results)` with a file store."""
    import torch

    with forked.server().Manager() as manager:
        results = manager.dict()
        arguments = (str(folder / "store"), results)
        torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
        return dict(results)


def load_weights(directory: Path) -> dict[str, Any]:
    """Returns the model's complete weights from a torch_dist checkpoint, whatever parallel layout wrote it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(data.size, dtype=data.properties.dtype)
        for name, data in stored.items()
        if isinstance(data, TensorStorageMetadata) and not name.startswith("optimizer")
    }
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return weights
