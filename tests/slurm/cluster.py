# SPDX-License-Identifier: Apache-2.0
"""A real SLURM cluster of virtual nodes on this machine, for the time of a test; needs root and Debian's packages.

Each node is a set of Linux namespaces with a name, an address and a process table of its own, in which a slurmd runs.
When a node's first process is killed, the kernel kills all others.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch import users_environment

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "unshare", "nsenter")
CLUSTERS = 40  # that may run on this machine at the same time, each with a network and a port of its own
CONFIG = """
ClusterName=test
SlurmctldHost={host}({network}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
NodeName=node[1-{nodes}] NodeAddr={network}.[1-{nodes}] CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=test Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""
FIRST_PROCESS = """
hostname {name}
mount --bind {root}/hosts /etc/hosts
until [ -e {root}/{name}.connected ]; do sleep 0.02; done
slurmd -D -N {name} -f {root}/slurm.conf &
wait
sleep infinity
"""


class ClusterError(RuntimeError):
    """The cluster does not start; the message says why."""


def why_not() -> str | None:
    """Returns why no cluster can run here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if os.geteuid() != 0:
        return "virtual nodes need root"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """The cluster, as a context.

    Args:
        nodes: Number of nodes, `node1`, `node2`, ...
    """

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = nodes
        self.root = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))  # short: sockets' paths are limited
        self.environment = users_environment() | {
            "PATH": _path(),
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "LC_ALL": "C",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.bridge = self.network = ""

    def __enter__(self) -> Cluster:
        """Starts the cluster and waits until all nodes are idle."""
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Ends everything that was started."""
        for name in sorted(self.daemons, reverse=True):  # slurmctld, nodes, munged
            self._end(name)
        if self.bridge:
            self.run("ip", "link", "del", self.bridge, check=False)
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, *command: object, check: bool = True) -> str:
        """Runs one of SLURM's programs and returns its output."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, job: object) -> str:
        """Returns a job's state, such as RUNNING."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.removeprefix("JobState=") for word in words if word.startswith("JobState="))

    def restarts(self, job: object) -> int:
        """Returns how often a job was requeued."""
        words = self.run("scontrol", "show", "job", job).split()
        return int(next(word.removeprefix("Restarts=") for word in words if word.startswith("Restarts=")))

    def wait(self, job: object, *states: str, seconds: float = 300) -> None:
        """Waits until a job is in one of these states."""
        _until(lambda: self.state(job) in states, seconds, lambda: f"job {job} is {self.state(job)}")

    def inside(self, node: int, *command: object) -> str:
        """Runs a command in a node's namespaces and returns its output."""
        return self.run("nsenter", "-t", self._first(node), "--all", "--", *command)

    def lose(self, node: int) -> None:
        """Ends all processes of a node at once, as a loss of power does."""
        self._end(f"node{node}")

    def restore(self, node: int) -> None:
        """Starts a node again, with nothing of what was changed in it, and waits until it is idle."""
        if f"node{node}" in self.daemons:
            self.lose(node)
        self.boot(node)
        state = ["sinfo", "-h", "-n", f"node{node}", "-o", "%t"]
        _until(lambda: self.run(*state).strip() == "idle", 60, lambda: self.run("sinfo", "-N", "-l"))

    def boot(self, node: int) -> None:
        """Starts a node."""
        name = f"node{node}"
        (self.root / f"{name}.connected").unlink(missing_ok=True)
        (self.root / f"spool.{name}").mkdir(exist_ok=True)
        script = FIRST_PROCESS.format(name=name, root=self.root)
        spaces = ["--uts", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        self._daemon(name, "unshare", *spaces, "bash", "-c", script)
        _until(lambda: bool(self._first(node)), 5, lambda: f"{name} does not start")
        first = self._first(node)
        own = os.readlink("/proc/self/ns/net")
        _until(lambda: os.readlink(f"/proc/{first}/ns/net") != own, 5, lambda: f"{name} has no network")
        link = f"{self.bridge}n{node}"
        self.run("ip", "link", "del", link, check=False)
        self.run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", first)
        self.run("ip", "link", "set", link, "master", self.bridge, "up")
        inside = f"ip link set lo up; ip addr add {self.network}.{node}/24 dev eth0; ip link set eth0 up"
        self.run("nsenter", "-t", first, "-n", "sh", "-c", inside)
        (self.root / f"{name}.connected").touch()

    def _first(self, node: int) -> int:
        """Returns the number of a node's first process; 0 before there is one."""
        outside = self.daemons[f"node{node}"].pid
        children = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
        return int(children[0]) if children else 0

    def _start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        self.root.chmod(0o755)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        number = self._connect()
        addresses = {"localhost": "127.0.0.1", host: f"{self.network}.254"}
        addresses |= {f"node{node}": f"{self.network}.{node}" for node in range(1, self.nodes + 1)}
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        port = 16800 + number
        config = CONFIG.format(host=host, network=self.network, port=port, root=self.root, nodes=self.nodes)
        (self.root / "slurm.conf").write_text(config)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        files = {name: self.root / f"munge.{name}" for name in ("pid", "log", "seed")}
        self._daemon(
            "amunged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.sock"),
            *(f"--{name}-file={path}" for name, path in files.items()),
        )
        munge = ["munge", "-S", self.root / "munge.sock", "-n"]
        _until(lambda: "MUNGE" in self.run(*munge, check=False), 10, lambda: self._log("amunged"))
        (self.root / "state").mkdir()
        self._daemon("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", self.root / "slurm.conf")
        _until(lambda: "is UP" in self.run("scontrol", "ping", check=False), 15, lambda: self._log("slurmctld"))
        for number in range(1, self.nodes + 1):
            self.boot(number)
        idle = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
        _until(lambda: len(self.run(*idle).split()) == self.nodes, 30, lambda: self.run("sinfo", "-N", "-l"))

    def _connect(self) -> int:
        """Makes the nodes' bridge and network; returns the cluster's number, that of a bridge that did not exist."""
        for number in range(CLUSTERS):
            bridge = f"slurm{number}"
            if "File exists" in (said := self.run("ip", "link", "add", bridge, "type", "bridge", check=False)):
                continue
            if said:
                raise ClusterError(f"no bridge: {said}")
            self.bridge, self.network = bridge, f"10.214.{number}"
            self.run("ip", "addr", "add", f"{self.network}.254/24", "dev", bridge)
            self.run("ip", "link", "set", bridge, "up")
            return number
        raise ClusterError(f"the bridges slurm0 to slurm{CLUSTERS - 1} exist: remove those of ended runs (ip link del)")

    def _daemon(self, name: str, *command: object) -> None:
        log = (self.root / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            list(map(str, command)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _end(self, name: str) -> None:
        process = self.daemons.pop(name)
        process.send_signal(signal.SIGKILL if name.startswith("node") else signal.SIGTERM)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _log(self, name: str) -> str:
        return (self.root / f"{name}.out").read_text(errors="replace")[-2000:]


def _until(holds: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise ClusterError(f"not within {seconds:.0f} s: {otherwise()}")
        time.sleep(0.05)
