# SPDX-License-Identifier: Apache-2.0
"""Runs one program without network and with limits; started as a script by code_execution.py, never imported.

Reads a request from its standard input, `{"program", "mark", "memory", "file_size", "cpu_seconds", "processes",
"paths"}`, and writes one line to its standard output: the mark if the program ran to its end, otherwise what ended it.
Only the standard library is used, and no module of this project, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

UNAVAILABLE = 3  # exit status where the kernel grants no isolation
NOBODY = 65534
INSIDE = 1000  # the user's number inside; not 0, which would regain capabilities with every exec

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 1, 2, 4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1  # the same on all architectures
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION = 1, 38, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def check(result: int, what: str) -> None:
    """Raises OSError if a C function failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(kind: str | None, target: str, flags: int, options: str = "") -> None:
    """Mounts a file system, or changes how one is mounted."""
    name = kind.encode() if kind else None
    check(libc.mount(name, target.encode(), name, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Adds to an OSError what failed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None


def leave_root() -> None:
    """Makes the real user another than root, which the kernel exempts from the limit of processes; files stay readable.

    In a container that has mapped only its own user, root is not the kernel's root and has that limit anyway.
    """
    with open("/proc/self/uid_map") as file:
        outside = file.read().split()[1]
    if outside == "0":
        with named("setresuid"):
            os.setresuid(NOBODY, 0, 0)


def isolate(work: str, file_size: int) -> None:
    """Enters namespaces without network, other processes, and writable files outside the folder `work`."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        leave_root()
    spaces = os.CLONE_NEWUSER | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWNS | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    with named("unshare"):
        os.unshare(spaces)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
        with named(f"/proc/self/{name}"), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    mount(None, "/", MS_REC | MS_PRIVATE)
    attributes = MountAttributes(attr_set=MOUNT_ATTR_RDONLY)
    arguments = (AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    check(libc.syscall(SYS_MOUNT_SETATTR, *arguments), "mount_setattr /")
    # Sockets of services (containers, desktops) are in /run: no network is needed to reach those.
    for folder in {os.path.realpath(path) for path in ("/run", "/var/run") if os.path.isdir(path)}:
        mount("tmpfs", folder, MS_NOSUID | MS_NODEV | MS_RDONLY)
    mount("tmpfs", work, MS_NOSUID | MS_NODEV, f"size={4 * file_size},mode=700")
    os.chdir(work)


def drop_capabilities() -> None:
    """Gives up what the new user namespace granted, so that no mount can be undone."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def limit(request: dict[str, Any]) -> None:
    """Sets the limits of memory, file size, CPU time and processes; they hold for all children too."""
    limits = {
        resource.RLIMIT_AS: request["memory"],
        resource.RLIMIT_FSIZE: request["file_size"],
        resource.RLIMIT_CPU: request["cpu_seconds"],
        resource.RLIMIT_NPROC: request["processes"],
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def run(request: dict[str, Any], report: int) -> None:
    """Runs the program in this process and reports how it ended; `report` is the pipe's file descriptor."""
    sys.path += request["paths"]
    mark, program = request.pop("mark"), request.pop("program")
    try:
        exec(compile(program, "<program>", "exec"), {})
    except SystemExit:
        line = "ended by sys.exit before the tests were done"
    except BaseException as error:
        line = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
    else:
        line = mark
    os.write(report, line.encode(errors="replace") + b"\n")
    os._exit(0)


def fork(function: Any, *arguments: Any) -> int:
    """Runs a function in a child that ends with its parent; returns the child's wait status."""
    child = os.fork()
    if child == 0:
        try:
            check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
            function(*arguments)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def first_process(request: dict[str, Any], report: int) -> None:
    """Is process 1 of the namespace: when it ends, the kernel kills whatever the program has started."""
    # It hides the other processes; where parts of /proc are masked, as in some containers, it is not permitted.
    with contextlib.suppress(OSError):
        mount("proc", "/proc", MS_NOSUID | MS_NODEV | MS_RDONLY)
    fork(confined, request, report)
    os._exit(0)


def confined(request: dict[str, Any], report: int) -> None:
    """Gives up the rights and runs the program."""
    drop_capabilities()
    limit(request)
    run(request, report)


def main() -> None:
    """Reads the request, isolates this process, and runs the program in a grandchild."""
    request = json.load(sys.stdin)
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        isolate(os.getcwd(), request["file_size"])
    except (OSError, AttributeError) as error:
        os.write(report, f"{error}\n".encode())
        os._exit(UNAVAILABLE)
    fork(first_process, request, report)


if __name__ == "__main__":
    main()
