# SPDX-License-Identifier: Apache-2.0
"""What nodes find out together: how their clocks differ, and whether and how fast they all-reduce."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_smar.launch.preflight.state import Finding

MEGABYTES_GPU, MEGABYTES_CPU = 256, 8
REPEATS = 5


class Stage:
    """What a process is doing, for the message if it hangs.

    Args:
        node: The process's node.
        rank: Its number in the group.
        seconds: After this time the process says what it is doing, and ends.
    """

    def __init__(self, node: str, rank: int, seconds: float) -> None:
        self.node, self.rank, self.name = node, rank, "start"
        self._timer = threading.Timer(seconds, self._overdue, (seconds,))
        self._timer.daemon = True
        self._timer.start()

    def fault(self, what: str) -> Finding:
        """Returns the fault of a process that fails in this stage."""
        return Finding(self.node, "all-reduce", "fails", f"process {self.rank} on {self.node}, {self.name}: {what}")

    def _overdue(self, seconds: float) -> None:
        print(self.fault(f"no answer in {seconds:.0f} s").line(), flush=True)
        os._exit(1)


def all_reduce(node: str, gpus: bool, seconds: float, report: Callable[[Finding], None]) -> None:
    """Runs one process's part; SLURM's variables say which one it is.

    Args:
        node: The process's node.
        gpus: Whether each process has a GPU, and NCCL is used instead of Gloo.
        seconds: Time until what hangs is a fault.
        report: Gets what was found, in one process on each node.
    """
    rank, world, local = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
    stage = Stage(node, rank, seconds)
    try:
        found = _measure(stage, gpus, world, local, timedelta(seconds=seconds))
    except Exception as error:  # torch raises its own errors, RuntimeError and others
        lines = str(error).splitlines() or [""]
        report(stage.fault(f"{type(error).__name__}: {lines[0][:300]}"))
        os._exit(1)  # torch's destructors could wait for the others
    if local == 0:
        for finding in found:
            report(finding)


def _measure(stage: Stage, gpus: bool, world: int, local: int, timeout: timedelta) -> list[Finding]:
    import torch
    import torch.distributed as dist

    rank = stage.rank
    stage.name = f"connecting to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=rank == 0, timeout=timeout
    )
    stage.name = "comparing clocks"
    skew = clock_skew(store, rank, world)
    stage.name = "connecting to the other nodes"
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=device if gpus else None,
    )
    stage.name = "in the all-reduce"
    speed = _bandwidth(torch, dist, device, rank, world)
    stage.name = "leaving"
    dist.barrier()
    dist.destroy_process_group()
    return [
        Finding(stage.node, "clock", f"{round(skew * 1000):+d} ms", details={"skew": skew}),
        Finding(stage.node, "all-reduce", details={"bandwidth": speed, "processes": world}),
    ]


def clock_skew(store: Any, rank: int, world: int, clock: Callable[[], float] = time.time) -> float:
    """Returns how many seconds this process's clock is ahead of the first one's; exact to half of a round trip."""
    if rank:
        store.get(f"clock/turn{rank}")
        before = clock()
        store.set(f"clock/ask{rank}", b"")
        first = float(store.get(f"clock/answer{rank}"))
        return (before + clock()) / 2 - first
    for other in range(1, world):
        store.set(f"clock/turn{other}", b"")
        store.get(f"clock/ask{other}")
        store.set(f"clock/answer{other}", repr(clock()))
    return 0.0


def _bandwidth(torch: Any, dist: Any, device: Any, rank: int, world: int) -> float:
    """All-reduces known numbers; returns bytes per second and process as nccl-tests counts them (bus bandwidth)."""
    megabytes = MEGABYTES_GPU if device.type == "cuda" else MEGABYTES_CPU
    values = torch.empty(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    times = []
    for _ in range(REPEATS + 1):  # the first one connects
        values.fill_(rank + 1)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        expected = world * (world + 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"the all-reduce gave {values.min().item()} to {values.max().item()}, not {expected}")
    moved = 2 * (world - 1) / world * values.numel() * 4
    return moved / min(times[1:])
