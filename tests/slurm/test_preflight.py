# SPDX-License-Identifier: Apache-2.0
"""The preflight on a real SLURM: nodes that are made bad, and what becomes of the job."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import NODES, Jobs

WHERE = """
import os
print("runs on", os.uname().nodename, os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"])
"""


@contextlib.contextmanager
def covered(cluster: Cluster, node: int, target: Path, *mount: object) -> Iterator[None]:
    """Shows another folder or file in a target's place on one node."""
    cluster.inside(node, "mount", *mount, target)
    try:
        yield
    finally:
        cluster.inside(node, "umount", target)


def rows(log: str) -> dict[str, list[str]]:
    """Returns the preflight's table: the words of each node's row."""
    table = log.partition("Preflight of ")[2].splitlines()[2:]
    return {line.split()[0]: line.split() for line in table if line.startswith("node") and line.endswith(("yes", "no"))}


def test_a_node_that_cannot_write_checkpoints_is_used_or_its_spare_is_not(jobs: Jobs):
    jobs.save.mkdir()
    with covered(jobs.cluster, 1, jobs.save, "-t", "tmpfs", "-o", "ro", "none"):
        [job] = jobs.submit(*NODES, "--spare-nodes", 1, "--", jobs.program(WHERE), "--save", jobs.save)
        log = jobs.finish(job, "COMPLETED")
    assert f"node1 cannot write and read in {jobs.save} (Read-only file system): give it the right to" in log
    assert "node1 is left out: see above.\nThe run uses node2, node3." in log
    assert {node: row[-1] for node, row in rows(log).items()} == {"node1": "no", "node2": "yes", "node3": "yes"}
    assert "All-reduce of 2 processes: " in log
    ranks = [(jobs.logs / f"{job}/attempt_0/rank_{rank}.log").read_text() for rank in range(4)]
    for rank, text in enumerate(ranks):
        assert f"runs on node{2 + rank // 2} {rank} 4 node2\n" in text
    assert list(jobs.save.iterdir()) == []


def test_a_bad_node_hides_what_is_wrong_with_the_others_or_a_silent_one_makes_the_job_hang(jobs: Jobs):
    cluster = jobs.cluster
    other = jobs.root / "other"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.7\n")
    installed = importlib.metadata.distribution("torch")._path
    port, bash = 23456, Path("/usr/bin/bash")
    listens = f"import socket, time; s = socket.socket(); s.bind(('', {port})); s.listen(); time.sleep(600)"
    cluster.inside(
        1, "bash", "-c", f'setsid {jobs.python} -c "{listens}" </dev/null >/dev/null 2>&1 & echo $! >{other}/pid'
    )
    sleeper = jobs.root / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    try:
        with covered(cluster, 2, installed, "--bind", other), covered(cluster, 3, bash, "--bind", sleeper):
            flags = [*NODES, "--spare-nodes", 1, "--no-requeue", "--preflight-seconds", 12]
            flags += ["--env", f"MASTER_PORT={port}"]
            [job] = jobs.submit(*flags, "--", jobs.program(WHERE), "--save", jobs.save)
            log = jobs.finish(job, "FAILED")
    finally:
        cluster.inside(1, "bash", "-c", f"kill $(cat {other}/pid)")
    assert f"port {port}, at which the ranks meet, is taken on node1 (Address already in use): end the program" in log
    assert f"node2 has other versions, torch 2.12.7 (on 1 of 2 nodes: {installed.name[6:-10]}): give all nodes" in log
    assert "node3 did not answer within 12 s: look at it (scontrol show node node3) or leave it out" in log
    assert "The run needs 2 nodes that pass (well: none); it does not start." in log
    assert not list((jobs.logs / str(job) / "attempt_0").glob("rank_*.log"))


@pytest.mark.matrix
def test_a_node_whose_installation_is_broken_is_not_found_among_those_that_fail_with_it(jobs: Jobs):
    import torch

    package = Path(torch.__file__).parent / "distributed"
    with covered(jobs.cluster, 2, package, "-t", "tmpfs", "none"):
        flags = [*NODES, "--spare-nodes", 1, "--preflight-seconds", 30]
        [job] = jobs.submit(*flags, "--", jobs.program(WHERE), "--save", jobs.save)
        log = jobs.finish(job, "COMPLETED")
    assert "node2 fails in an all-reduce by itself (process 0 on node2, " in log
    assert "The run uses node1, node3." in log and "All-reduce of 2 processes: " in log
