# SPDX-License-Identifier: Apache-2.0
"""Jobs that tools/launch.py submits to the cluster of virtual nodes."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.launch import ROOT
from tests.slurm.cluster import Cluster

NODES = ["--cpu", "--nodes", 2, "--processes-per-node", 2, "--cpus-per-process", 1]


@dataclass(frozen=True)
class Jobs:
    """Jobs of one test.

    Attributes:
        cluster: Where they run.
        root: The test's folder, with `logs`, `save` and the program.
    """

    cluster: Cluster
    root: Path

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def save(self) -> Path:
        return self.root / "save"

    @property
    def python(self) -> str:
        return sys.executable

    def program(self, text: str) -> Path:
        """Writes the program that the ranks run."""
        file = self.root / "program.py"
        file.write_text(text)
        return file

    def launch(self, *flags: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `tools/launch.py slurm`."""
        done = subprocess.run(
            [sys.executable, "tools/launch.py", "slurm", "--logs", str(self.logs), *map(str, flags)],
            cwd=ROOT,
            env=self.cluster.environment | {"OMP_WAIT_POLICY": "PASSIVE"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *flags: object) -> list[int]:
        """Submits jobs and returns their numbers."""
        said = self.launch(*flags).stdout.partition(":")[0].partition(" of ")[0]
        return [int(number) for number in re.findall(r"\d+", said)]

    def log(self, job: object) -> str:
        """Returns what a job has written."""
        file = self.logs / f"{job}.log"
        return file.read_text() if file.is_file() else ""

    def finish(self, job: object, state: str, seconds: float = 120) -> str:
        """Waits until a job has ended in a state, and returns what it has written."""
        self.cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED", "TIMEOUT", seconds=seconds)
        assert self.cluster.state(job) == state, self.log(job)
        return self.log(job)
