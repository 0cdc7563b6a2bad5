# SPDX-License-Identifier: Apache-2.0
"""After a signal a run finishes its step, saves and prints how to resume; a second signal ends it immediately."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_smar.data.sample_log import read_recorded
from tests.conftest import free_port
from tests.launch import ROOT, users_environment

SIZES = [
    *"--micro-batch-size 2 --global-batch-size 4 --num-workers 2 --train-iters 100000 --save-interval 100000".split()
]


class Started:
    """A running program and its output."""

    def __init__(self, folder: Path, *command: object) -> None:
        self.keys, self.log = folder / "keys", folder / "log"
        command = (sys.executable, *command, "--record-samples", self.keys)
        self.environment = users_environment() | {
            "OMP_NUM_THREADS": "1",
            "MEGATRON_SMAR_DEVICE": "cpu",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},  # torchrun sets its own
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())},
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 240
        while step not in (read_recorded(self.keys) if self.keys.exists() else {}):
            assert time.monotonic() < end and self.process.poll() is None, self.output
            time.sleep(0.02)

    def family(self) -> list[int]:
        """Returns the ids of the process and its descendants: torchrun, ranks, data workers."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def signal_all(self, sig: signal.Signals) -> None:
        """Sends the signal to every process, as a terminal or a cluster manager does."""
        for pid in self.family():
            os.kill(pid, sig)

    def end(self, seconds: float) -> int:
        family = self.family()
        try:
            return self.process.wait(seconds)
        finally:
            time.sleep(0.2)
            left = [pid for pid in family if Path(f"/proc/{pid}/cmdline").exists() and _is_running(pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            assert not left, f"processes were left behind:\n{self.output}"

    @property
    def output(self) -> str:
        return self.log.read_text()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resume_line(output: str) -> tuple[int, list[str]]:
    """Returns the step that was saved, and the command that resumes."""
    (line,) = re.findall(
        r"^pretrain_vlm\.py: stopped after step (\d+) and saved to .*; resume with: (.*)$", output, re.M
    )
    return int(line[0]), shlex.split(line[1])


@pytest.mark.matrix
def test_ctrl_c_saves_at_the_end_of_the_step_and_the_printed_command_resumes_there(world, tmp_path):
    save = tmp_path / "with space"
    run = Started(tmp_path, "pretrain_vlm.py", *world.flags, *SIZES, "--save", save)
    run.wait_for_step(3)
    run.signal_all(signal.SIGINT)
    assert run.end(60) == 128 + signal.SIGINT, run.output
    step, command = resume_line(run.output)
    assert "Traceback" not in run.output and "DataLoader worker" not in run.output
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(step) and step >= 3
    assert list(read_recorded(run.keys)) == list(range(1, step + 1)), "data after the saved step was read"
    done = subprocess.run(
        [*command, "--exit-interval", str(step + 1)],
        cwd=ROOT,
        env=run.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(read_recorded(run.keys)) == list(range(1, step + 2)), "not exactly the next step"


@pytest.mark.matrix
def test_sigterm_to_every_process_of_two_ranks_saves_once_and_ends_them_together(world, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "pretrain_vlm.py"]
    run = Started(tmp_path, *launch, *world.flags, *SIZES, "--save", tmp_path / "save")
    run.wait_for_step(3)
    run.signal_all(signal.SIGTERM)
    assert run.end(60) != 0
    step, command = resume_line(run.output)
    assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == str(step)
    assert "DataLoader worker" not in run.output and "a second SIGTERM" not in run.output
    assert {len(ranks) for ranks in read_recorded(run.keys).values()} == {2}


@pytest.mark.matrix
def test_a_signal_to_one_rank_of_two_ends_both_and_virtual_stages_save_the_loaders_state(world, tmp_path):
    """Two stages of two chunks each, whose position in the data Megatron does not save."""
    virtual = ["--num-layers", 4, "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "pretrain_vlm.py"]
    run = Started(tmp_path, *launch, *world.flags, *SIZES, *virtual, "--save", tmp_path / "save")
    run.wait_for_step(2)
    children = [pid for pid in run.family() if b"pretrain_vlm.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(children[2], signal.SIGTERM)  # the list starts with torchrun and the other rank
    assert run.end(60) != 0
    step = resume_line(run.output)[0]
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == str(step)
    states = [
        path.relative_to(tmp_path / "save" / "dataloader") for path in (tmp_path / "save").rglob("train_data*.pt")
    ]
    assert [path.parts[0] for path in states] == [f"iter_{step:07d}"], "not exactly the state of the saved step"


@pytest.mark.matrix
def test_a_second_signal_ends_a_long_step_immediately_with_its_workers(world, tmp_path):
    long_step = [*SIZES, "--global-batch-size", 100_000, "--save", tmp_path / "save"]
    run = Started(tmp_path, "pretrain_vlm.py", *world.flags, *long_step)
    run.wait_for_step(1)
    run.signal_all(signal.SIGINT)
    time.sleep(1)
    assert run.process.poll() is None and "the run ends after this step" in run.output
    run.signal_all(signal.SIGTERM)
    begin = time.monotonic()
    assert run.end(10) == 128 + signal.SIGTERM
    assert time.monotonic() - begin < 5 and "a second SIGTERM: ended at once" in run.output
    assert not (tmp_path / "save" / "latest_checkpointed_iteration.txt").exists()
