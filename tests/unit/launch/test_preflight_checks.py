# SPDX-License-Identifier: Apache-2.0
"""The checks of a node, with real files, ports and processes."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_smar.launch.attempts import TRACKER
from megatron_smar.launch.preflight import local
from megatron_smar.launch.preflight.collective import clock_skew
from megatron_smar.launch.preflight.local import Request, findings
from megatron_smar.launch.preflight.state import Finding, read_trial
from tests.launch import users_environment

SMI = """#!/bin/sh
echo "0, GPU-aaa, NVIDIA H100 80GB HBM3, 4, 580.1"
echo "1, GPU-bbb, NVIDIA H100 80GB HBM3, 40000, 580.1"
"""


def check(tmp_path: Path, **changes: object) -> dict[str, Finding]:
    """Runs a node's own checks."""
    given = {"node": "node1", "logs": tmp_path, "port": free_port(), "processes": 1, "gpus": False} | changes
    return {finding.check: finding for finding in findings(Request(**given), 10)}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("", 0))
        return tried.getsockname()[1]


def test_a_node_that_is_well_has_a_fault(tmp_path):
    (tmp_path / "data.txt").write_text("x")
    save, program = tmp_path / "new" / "save", tmp_path / "p.py"
    program.touch()
    found = check(tmp_path, save=save, data=(tmp_path, tmp_path / "data.txt"), program=program, cores=1)
    assert [finding.fault for finding in found.values()] == [""] * 6
    assert list(save.iterdir()) == [] and found["save"].value.endswith(" GiB free")
    assert found["versions"].details.keys() == {"python", "torch", "megatron-core", "megatron_smar"}


def test_files_that_a_node_does_not_see_are_not_reported(tmp_path):
    (tmp_path / "file").touch()
    none = tmp_path / "none"
    found = check(tmp_path, save=tmp_path / "file", data=(none,), program=none, cores=10**6)
    assert (
        f"node1 cannot write and read in {tmp_path / 'file'} (File exists): give it the right to" in found["save"].fault
    )
    assert found["data"].fault.startswith(f"node1 cannot read {none} (No such file or directory): copy the data to it")
    assert found["files"].fault.startswith(f"node1 has no {none} in {Path.cwd()}: start the job from a folder")
    assert "cores for the job and its ranks need 1000000: give fewer" in found["devices"].fault
    assert check(none)["files"].fault.startswith(f"node1 does not see {none}: give --logs on a file system")


def test_a_disk_on_which_no_further_checkpoint_fits_is_well(tmp_path):
    (tmp_path / TRACKER).write_text("20")
    newest = tmp_path / "iter_0000020"
    newest.mkdir()
    with (newest / "weights").open("wb") as file:
        file.truncate(2**43)  # 8 TiB that take no space
    assert (
        "GiB free on node1, and a checkpoint takes 8192.0 GiB or more" in check(tmp_path, save=tmp_path)["save"].fault
    )


def test_a_port_that_another_program_has_is_free(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}, at which the ranks meet, is taken on node1" in check(tmp_path, port=port)["port"].fault
    assert not check(tmp_path, port=port)["port"].fault


def test_a_gpu_that_is_missing_or_in_use_is_well(tmp_path, monkeypatch):
    """`nvidia-smi` is a script here: this machine has no GPU."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = check(tmp_path, gpus=True, processes=2)
    assert "other programs use memory of GPU 1 (40000 MiB) on node1: end them" in found["devices"].fault
    assert found["versions"].details["driver"] == "580.1"
    assert (
        "node1 shows 2 GPUs to the job and --processes-per-node is 8"
        in check(tmp_path, gpus=True, processes=8)["devices"].fault
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not check(tmp_path, gpus=True, processes=1)["devices"].fault


def test_a_check_that_hangs_or_fails_ends_the_others(tmp_path, monkeypatch):
    def hangs(request: Request) -> None:
        threading.Event().wait()

    def fails(request: Request) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(local, "CHECKS", ((hangs, "save"), (fails, "devices"), (local.port, "port")))
    request = Request("node1", tmp_path, free_port(), 1, False)
    first, second, third = findings(request, 0.2)
    assert first.fault.startswith("node1 hangs in the check of its save for more than 0 s: look at its file systems")
    assert second.fault == "the check of devices fails on node1 (RuntimeError: no driver)."
    assert third.check == "port" and not third.fault


def test_a_clock_that_is_ahead_is_measured_wrongly():
    import torch.distributed as dist

    port, found = free_port(), {}
    ahead = {0: 0.0, 1: 7.0, 2: -2.5}

    def process(rank: int) -> None:
        store = dist.TCPStore("localhost", port, 3, is_master=rank == 0, timeout=timedelta(seconds=20))
        found[rank] = clock_skew(store, rank, 3, lambda: time.time() + ahead[rank])
        store.set(f"done{rank}", b"")
        store.wait(["done0", "done1", "done2"])

    threads = [threading.Thread(target=process, args=(rank,)) for rank in ahead]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {rank: pytest.approx(seconds, abs=0.5) for rank, seconds in ahead.items()}


def probe(rank: int, world: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    variables = {"SLURM_PROCID": rank, "SLURM_NTASKS": world, "SLURM_LOCALID": 0, "SLURMD_NODENAME": f"node{rank + 1}"}
    variables |= {"PREFLIGHT": "all-reduce", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    words = [sys.executable, "-m", "megatron_smar.launch.preflight.probe", "--processes", "1"]
    return subprocess.Popen(
        [*words, "--seconds", "60", "--", "x.py"],
        env=users_environment() | {name: str(value) for name, value in variables.items()},
        stdout=log.open("wb"),
        stderr=subprocess.DEVNULL,
    )


def test_two_processes_do_not_all_reduce(tmp_path):
    port = free_port()
    both = [probe(rank, 2, port, tmp_path / f"{rank}") for rank in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    for rank in range(2):
        trial = read_trial([f"node{rank + 1}"], tmp_path / f"{rank}")
        assert trial.passed and float(trial.findings[1].details["bandwidth"]) > 1e6


def test_a_process_that_waits_for_ever_is_not_ended_or_does_not_say_for_what(tmp_path):
    waits = "stage = Stage('node1', 3, 0.2); stage.name = 'comparing clocks'; threading.Event().wait()"
    words = f"import threading; from megatron_smar.launch.preflight.collective import Stage; {waits}"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", words], stdout=log, timeout=30, check=False)
    trial = read_trial(["node1"], tmp_path / "log")
    assert done.returncode == 1 and not trial.passed
    assert trial.findings[0].fault == "process 3 on node1, comparing clocks: no answer in 0 s"
