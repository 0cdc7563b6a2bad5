# SPDX-License-Identifier: Apache-2.0
"""Faults of a running job, each caused from outside its processes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_smar.reliability.saving import STAGING
from tests.slurm.cluster import Cluster

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Target:
    """The job that the faults hit.

    Attributes:
        cluster: The cluster of virtual nodes.
        job: The job's number.
        logs: Folder of the job's logs.
        save: Folder of its checkpoints, on a disk of its own.
        ranks: Number of its ranks.
    """

    cluster: Cluster
    job: int
    logs: Path
    save: Path
    ranks: int

    def attempt(self) -> int:
        """Returns the number of the newest attempt that has written a log."""
        return max((int(p.name.partition("_")[2]) for p in self.logs.glob("attempt_*")), default=-1)

    def step(self, attempt: int | None = None) -> int:
        """Returns the last step that an attempt has made; 0 before its first."""
        attempt = self.attempt() if attempt is None else attempt
        log = self.logs / f"attempt_{attempt}" / f"rank_{self.ranks - 1}.log"
        found = re.findall(rb"iteration +(\d+)/", log.read_bytes()) if log.is_file() else []
        return int(found[-1]) if found else 0

    def first_step(self, attempt: int) -> int:
        """Returns the first step that an attempt has made; 0 before it."""
        log = self.logs / f"attempt_{attempt}" / f"rank_{self.ranks - 1}.log"
        found = re.search(rb"iteration +(\d+)/", log.read_bytes()) if log.is_file() else None
        return int(found[1]) if found else 0

    def saved(self) -> int:
        """Returns the step that the tracker names; 0 before the first checkpoint."""
        tracker = self.save / TRACKER
        return int(tracker.read_text()) if tracker.is_file() else 0

    def processes(self) -> dict[int, int]:
        """Returns the process of each rank, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if b"pretrain_vlm.py" not in command or Path(f"/proc/{parent}/comm").read_text().strip() != "bash":
                    continue  # a data worker's parent is a rank
                variables = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if line)
                if variables.get(b"SLURM_JOB_ID") != str(self.job).encode():
                    continue
                found[int(variables[b"RANK"])] = int(folder.name)
        return found

    def wait(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until something holds, as long as the job has not ended."""
        end, ended = time.monotonic() + seconds, 0.0
        while not holds():
            assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s\n{self.log()}"
            if time.monotonic() > ended + 5:
                ended = time.monotonic()
                state = self.cluster.state(self.job)
                assert state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), f"{what}: {state}\n{self.log()}"
            time.sleep(0.002)

    def log(self) -> str:
        """Returns the end of the job's log and of its newest attempt's last rank."""
        logs = [self.logs.with_suffix(".log"), *self.logs.glob(f"attempt_{self.attempt()}/rank_*.log")]
        return "\n".join(f"== {path}\n{path.read_text(errors='replace')[-2500:]}" for path in logs if path.is_file())

    def is_saving(self) -> bool:
        """Returns whether weights are being written."""
        return any((self.save / STAGING).glob("iter_*/*.distcp"))


def kill(processes: list[int]) -> None:
    """Ends processes at once."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_one(target: Target, chance: random.Random) -> None:
    """SIGKILL of one rank."""
    kill([chance.choice(sorted(target.processes().values()))])


def kill_all(target: Target, chance: random.Random) -> None:
    """SIGKILL of all ranks."""
    kill(list(target.processes().values()))


def lose_node(target: Target, chance: random.Random) -> None:
    """Loss of a node, which is replaced."""
    node = chance.choice([1, 2])
    target.cluster.lose(node)
    target.wait(lambda: target.cluster.state(target.job) != "RUNNING", 90, "the lost node is not noticed")
    target.cluster.boot(node)


def kill_one_in_save(target: Target, chance: random.Random) -> None:
    """SIGKILL of one rank during a save."""
    processes = [chance.choice(sorted(target.processes().values()))]
    target.wait(target.is_saving, 120, "no save")
    kill(processes)


def kill_all_in_save(target: Target, chance: random.Random) -> None:
    """SIGKILL of all ranks during a save."""
    processes = list(target.processes().values())
    target.wait(target.is_saving, 120, "no save")
    kill(processes)


def preempt(target: Target, chance: random.Random) -> None:
    """Preemption: SLURM takes the nodes and requeues the job."""
    target.cluster.run("scontrol", "requeue", target.job)


def warn_of_time_limit(target: Target, chance: random.Random) -> None:
    """The warning before the time limit."""
    target.cluster.run("scancel", "--batch", "--signal=USR1", target.job)


def damage_newest(target: Target, chance: random.Random) -> None:
    """One bit of the newest checkpoint changes, and all ranks are killed."""
    target.wait(lambda: len(list(target.save.glob("iter_*"))) > 1, 120, "no two checkpoints")
    kill(list(target.processes().values()))
    checkpoint = target.save / f"iter_{target.saved():07d}"
    path = chance.choice(sorted(checkpoint.glob("*.distcp")))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fills a disk while weights are being written to it."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        yield
    finally:
        filler.unlink()


def fill_disk(target: Target, chance: random.Random) -> None:
    """The disk is full during a save; later there is room again."""
    log = target.logs / f"attempt_{target.attempt()}" / "rank_0.log"
    before = log.read_text().count("was not saved")
    with full(target.save.parent):
        target.wait(lambda: log.read_text().count("was not saved") > before, 120, "no save has failed")


# Each fault, and whether the job has to start again after it.
FAULTS: dict[Callable[[Target, random.Random], None], bool] = {
    kill_one: True,
    kill_all: True,
    lose_node: True,
    kill_one_in_save: True,
    kill_all_in_save: True,
    preempt: True,
    warn_of_time_limit: True,
    damage_newest: True,
    fill_disk: False,
}
IN_SAVES = {kill_one_in_save, kill_all_in_save, fill_disk}
