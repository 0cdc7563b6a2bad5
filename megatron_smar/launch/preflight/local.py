# SPDX-License-Identifier: Apache-2.0
"""What a node finds out by itself: versions, devices, files, its port. No check waits for another node."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron_smar
from megatron_smar.launch.preflight.state import Finding

LEAST_FREE = 2**30  # bytes, in a folder without a checkpoint
USED_BY_OTHERS = 1024  # MiB of a GPU's memory; a driver that holds nothing for a process takes less
PACKAGES = ("torch", "megatron-core")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
_TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's


@dataclass(frozen=True)
class Request:
    """What a node has to have.

    Attributes:
        node: Its name.
        logs: Folder of the attempt's logs.
        port: Port of the ranks' meeting point.
        processes: Ranks on the node.
        gpus: Whether each has a GPU.
        cores: CPU cores that they need; None if that is not checked.
        program: File of the program that will be run; None for a module.
        save: Folder of the run's checkpoints, if it has one.
        data: Files and folders from which it reads.
    """

    node: str
    logs: Path
    port: int
    processes: int
    gpus: bool
    cores: int | None = None
    program: Path | None = None
    save: Path | None = None
    data: tuple[Path, ...] = ()


def findings(request: Request, seconds: float) -> Iterator[Finding]:
    """Yields what each check finds; one that takes longer than its share of the time is a fault.

    Args:
        request: What the node has to have.
        seconds: Time for each check. A thread that hangs in a file system stays; the process has to be ended hard.
    """
    for check, name in CHECKS:
        found: list[Finding] = []
        work = threading.Thread(target=_run, args=(check, name, request, found), daemon=True)
        work.start()
        work.join(seconds)
        yield (
            found[0]
            if found
            else Finding(
                request.node,
                name,
                "hangs",
                f"{request.node} hangs in the check of its {name} for more than {seconds:.0f} s: look at its file "
                "systems (and at its driver, with nvidia-smi).",
            )
        )


def _run(check: Callable[[Request], Finding | None], name: str, request: Request, found: list[Finding]) -> None:
    try:
        found.append(check(request) or Finding(request.node, name, "-"))
    except Exception as error:  # whatever it is, the other checks go on
        what = f"{type(error).__name__}: {error}"
        found.append(Finding(request.node, name, "fails", f"the check of {name} fails on {request.node} ({what})."))


def versions(request: Request) -> Finding:
    """Returns what is compared with the other nodes: versions, and a checksum of this package's source code."""
    found: dict[str, str | float] = {"python": platform.python_version()}
    found |= {name: _version(name) for name in PACKAGES}
    found["megatron_smar"] = f"{megatron_smar.__version__} (source {_source()})"
    if request.gpus:
        found["NCCL"] = next((v for v in map(_version, NCCL) if v != "missing"), None) or _nccl()
        found["driver"] = next((gpu["driver_version"] for gpu in _gpus()), "missing")
    return Finding(request.node, "versions", details=found)


def devices(request: Request) -> Finding:
    """Finds whether there is a device for each rank, and whether it is free."""
    return _devices_gpu(request) if request.gpus else _devices_cpu(request)


def files(request: Request) -> Finding:
    """Finds whether the node sees the logs and the program."""
    here, fault = Path.cwd(), ""
    if not request.logs.is_dir():
        fault = f"{request.node} does not see {request.logs}: give --logs on a file system that all nodes share."
    elif request.program is not None and not request.program.is_file():
        fault = f"{request.node} has no {request.program} in {here}: start the job from a folder that all nodes share."
    return Finding(request.node, "files", "missing" if fault else "ok", fault)


def save(request: Request) -> Finding | None:
    """Writes, reads and deletes a file in the checkpoints' folder, and finds whether another checkpoint fits."""
    if request.save is None:
        return None
    probe = request.save / f".preflight_{request.node}_{os.getpid()}"
    content = os.urandom(2**20)
    try:
        request.save.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        same = probe.read_bytes() == content
        probe.unlink()
    except OSError as error:
        what = error.strerror or str(error)
        fault = (
            f"{request.node} cannot write and read in {request.save} ({what}): give it the right to, or another --save."
        )
        return Finding(request.node, "save", "unwritable", fault)
    free, needed = shutil.disk_usage(request.save).free, _newest(request.save) or LEAST_FREE
    value, fault = f"{free / 2**30:,.0f} GiB free", ""
    if not same:
        fault = (
            f"{request.node} reads other bytes from {request.save} than it wrote: its disk or file system is broken."
        )
    elif free < needed:
        fault = (
            f"{request.save} has {free / 2**30:.1f} GiB free on {request.node}, and a checkpoint takes "
            f"{needed / 2**30:.1f} GiB or more: free space, or give another --save."
        )
    return Finding(request.node, "save", value, fault)


def data(request: Request) -> Finding | None:
    """Finds whether the data can be read."""
    for path in request.data:
        try:
            file = _first_file(path)
            if file is not None:
                with file.open("rb") as opened:
                    opened.read(1)
        except OSError as error:
            fault = (
                f"{request.node} cannot read {error.filename or path} ({error.strerror}): copy the data to it, or give "
                "a folder that all nodes share."
            )
            return Finding(request.node, "data", "unreadable", fault)
    return Finding(request.node, "data") if request.data else None


def port(request: Request) -> Finding:
    """Finds whether the port at which the ranks meet is free: each node may be the first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a connection that has just been closed is no fault
        try:
            tried.bind(("", request.port))
            tried.listen()
        except OSError as error:
            fault = (
                f"port {request.port}, at which the ranks meet, is taken on {request.node} ({error.strerror}): end "
                f"the program that has it (ss -tlnp 'sport = :{request.port}'), or give --env MASTER_PORT=NUMBER."
            )
            return Finding(request.node, "port", "taken", fault)
    return Finding(request.node, "port", str(request.port))


CHECKS: tuple[tuple[Callable[[Request], Finding | None], str], ...] = tuple(
    (check, check.__name__) for check in (versions, devices, files, save, data, port)
)


def _devices_cpu(request: Request) -> Finding:
    cores, fault = len(os.sched_getaffinity(0)), ""
    if request.cores is not None and cores < request.cores:
        fault = (
            f"{request.node} has {cores} cores for the job and its ranks need {request.cores}: give fewer "
            "--processes-per-node or --cpus-per-process."
        )
    return Finding(request.node, "devices", f"{cores} cores", fault)


def _devices_gpu(request: Request) -> Finding:
    gpus, fault = _gpus(), ""
    used = [gpu for gpu in gpus if float(gpu["memory.used"]) > USED_BY_OTHERS]
    if len(gpus) != request.processes:
        fault = (
            f"{request.node} shows {len(gpus)} GPUs to the job and --processes-per-node is {request.processes}: if one "
            f"is missing, have the node repaired (nvidia-smi -L on it) and leave it out (--sbatch=--exclude="
            f"{request.node})."
        )
    elif used:
        taken = ", ".join(f"GPU {gpu['index']} ({gpu['memory.used']} MiB)" for gpu in used)
        fault = f"other programs use memory of {taken} on {request.node}: end them (nvidia-smi on it lists them)."
    return Finding(request.node, "devices", f"{len(gpus)} GPUs", fault)


def _gpus() -> list[dict[str, str]]:
    """Returns the GPUs that the job sees, of those that the driver shows."""
    columns = ("index", "uuid", "name", "memory.used", "driver_version")
    query = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    gpus = [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [gpu for gpu in gpus if any(gpu["index"] == name or gpu["uuid"].startswith(name) for name in names)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _nccl() -> str:
    """Returns the version of an NCCL that no package has installed, as in NVIDIA's containers."""
    import ctypes

    try:
        number = ctypes.c_int()
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return "missing"
    return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"


def _source() -> str:
    root = Path(megatron_smar.__file__).parent
    text = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        text.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return text.hexdigest()[:8]


def _first_file(path: Path) -> Path | None:
    """Returns a file of a folder, or the path itself; None for an empty folder."""
    if not path.is_dir():
        return path
    return next((path / entry.name for entry in os.scandir(path) if entry.is_file()), None)


def _newest(folder: Path) -> int:
    """Returns the size of the newest checkpoint in bytes; 0 without one."""
    tracker = folder / _TRACKER
    step = tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else ""
    newest = folder / (f"iter_{int(step):07d}" if step.isdigit() else step or "none")
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) if newest.is_dir() else 0
