# SPDX-License-Identifier: Apache-2.0
"""Ends a run in which no rank makes progress, after the stacks of all its threads; docs/reliability.md.

A thread looks at `runtime.progress` and, when this rank has been at one place for too long, asks the other ranks
(`peers`). As long as any of them makes progress, this one only waits for it. A C call that does not release Python's
lock would keep this thread from running; Python's faulthandler, whose own thread needs no lock, then ends the rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_smar.reliability.files_progress import moved_bytes
from megatron_smar.reliability.hang_report import Process, Report, own_report, process_status, sentence
from megatron_smar.reliability.peers import Peers
from megatron_smar.runtime import failure
from megatron_smar.runtime.progress import FILES, PROGRESS

STATUS = 75  # sysexits.h: a failure that may be gone at the next attempt
_FILE_PROGRESS = 1 << 20  # bytes that count as progress: more than a log is written in the meantime
_ENDING = 20.0  # seconds for what is written at the end, which may block too


class HangWatch:
    """Watches this rank's progress from a thread.

    Args:
        seconds: Limit without progress (--hang-seconds); 0 for none.
        first_seconds: The limit until the first step is complete (--hang-seconds-first-step); 0 for none.
        rank: This rank.
        size: Number of ranks.
        store: Returns torch's store once the ranks are connected, None before.
    """

    def __init__(
        self,
        seconds: float,
        first_seconds: float,
        rank: int,
        size: int,
        store: Callable[[], Any] = lambda: None,
    ) -> None:
        self._limits = seconds, first_seconds
        self._rank, self._size, self._store = rank, size, store
        self._peers: Peers | None = None
        self._patient_until = 0.0  # while another rank makes progress
        self._bytes = 0
        self._stopped, self._ended = threading.Event(), threading.Lock()
        shortest = min((limit for limit in self._limits if limit), default=0.0)
        self._tick = min(max(shortest / 20, 0.1), 5.0)
        self._patience = min(max(shortest / 10, 1.0), 10.0)
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    @property
    def limit(self) -> float:
        """The limit that applies now; 0 for none."""
        return self._limits[0] if PROGRESS.steps else self._limits[1]

    def start(self) -> None:
        """Starts the thread, if there is a limit."""
        PROGRESS.beat()
        if any(self._limits):
            self._thread.start()

    def stop(self) -> None:
        """Ends the watch: the run ends in order."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(2 * self._tick)
        faulthandler.cancel_dump_traceback_later()
        if self._peers is not None:
            self._peers.stop()

    def _watch(self) -> None:
        while not self._stopped.wait(self._tick):
            limit = self.limit
            if not limit:
                faulthandler.cancel_dump_traceback_later()
                continue
            # Only if this thread itself cannot run for so long.
            faulthandler.dump_traceback_later(limit + self._tick, exit=True, file=2)
            self._connect()
            self._count_files()
            now = time.monotonic()
            if now - PROGRESS.moved >= limit and now >= self._patient_until:
                self._suspect()

    def _connect(self) -> None:
        if self._peers is None and self._size > 1 and (store := self._store()) is not None:
            with contextlib.suppress(RuntimeError):  # without a store each rank decides alone
                self._peers = Peers(store, self._rank, self._size, self._patience, own_report, self._decide)

    def _count_files(self) -> None:
        """Counts a long save as progress while it writes, also in its processes; so does reading at the start."""
        if PROGRESS.place.section in FILES:
            moved = moved_bytes()
            if abs(moved - self._bytes) >= _FILE_PROGRESS:
                self._bytes = moved
                PROGRESS.beat()

    def _suspect(self) -> None:
        if self._peers is not None and self._peers.ask():
            return
        alone = "" if self._size == 1 else "the other ranks could not be asked"
        self._decide({self._rank: own_report()}, alone)

    def _decide(self, reports: Mapping[int, Report], alone: str = "") -> None:
        """Ends this rank if no rank has made progress; otherwise waits until that could be so."""
        limit, now = self.limit, time.monotonic()
        idle = min(report.idle for report in reports.values())
        if any(report.debugged for report in reports.values()):
            self._patient_until = now + limit
        elif idle < limit:
            self._patient_until = now + limit - idle
        else:
            self._end(reports, alone)

    def _end(self, reports: Mapping[int, Report], alone: str) -> None:
        if not self._ended.acquire(blocking=False):
            return
        faulthandler.dump_traceback_later(_ENDING, exit=True, file=2)
        self._write_stacks()
        time.sleep(self._patience / 2)  # until the other ranks have written theirs: the launcher ends them after us
        processes: dict[int, Process] = {}
        if self._peers is not None and alone:
            processes = self._peers.first
        elif self._peers is not None and len(reports) < self._size:
            with contextlib.suppress(RuntimeError):
                processes = self._peers.processes()
        flag = f"--hang-seconds{'' if PROGRESS.steps else '-first-step'} {self.limit:g}"
        said = sentence(reports, processes, self._size, flag, STATUS, alone)
        for child in multiprocessing.active_children():
            child.kill()
        failure.end_at_once(said, STATUS)

    def _write_stacks(self) -> None:
        """Writes the stacks of this rank's threads in one piece, since ranks share a terminal, and its workers'."""
        place = PROGRESS.place
        where = f"{'waiting for other ranks in ' if place.waits else ''}{place.section}"
        head = f"rank {self._rank}, in {where}, the stacks of all its threads:\n"
        os.write(2, f"{head}{_stacks()}\n".encode())
        for worker in _stack_writers():
            with contextlib.suppress(ProcessLookupError):
                os.write(2, f"rank {self._rank}, the stacks of data worker {worker}:\n".encode())
                os.kill(worker, signal.SIGUSR2)
                time.sleep(0.1)


def _stacks() -> str:
    """Returns the stacks of all threads of this process that run Python, with their names."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode(errors="replace")
    for thread in threading.enumerate():
        text = text.replace(f"hread 0x{thread.ident or 0:016x} (", f"hread {thread.name} (")
    return "\n\n".join(part for part in text.split("\n\n") if "<no Python frame>" not in part)


def _stack_writers() -> list[int]:
    """Returns the child processes that handle SIGUSR2: data workers, which then write their stacks (data/loader)."""
    pids = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    return [pid for pid in pids if int(process_status(pid, "SigCgt") or "0", 16) >> (signal.SIGUSR2 - 1) & 1]
