# SPDX-License-Identifier: Apache-2.0
"""How the ranks ask each other, while all of them may be stuck, whether the run hangs.

Each rank has a thread that waits in the run's store (torch's `TCPStore`, on connections of its own) until somebody
asks. So nothing is sent while all is well. A store that is lost or stuck delays nothing: whoever asks gives up in time.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from megatron_smar.reliability.hang_report import Process, Report

_LONG = timedelta(days=7)
_ASKED, _STOP = "asked", "stop"


class Peers:
    """The other ranks of a run.

    Args:
        store: torch's store, which is cloned: a connection serves one thread at a time.
        rank: This rank.
        size: Number of ranks.
        patience: Seconds to wait for the answers.
        report: Returns this rank's report.
        decide: Called on every rank with all answers, when any rank has asked.

    Attributes:
        first: Rank 0's process, which without torchrun serves the store; empty if it is not known.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        patience: float,
        report: Callable[[], Report],
        decide: Callable[[Mapping[int, Report]], None],
    ) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self._report, self._decide = report, decide
        self._listening, self._asking = store.clone(), store.clone()
        self._turn = 0  # how often the ranks have asked each other; the same on all of them
        self._asking.set(_key("process", rank), json.dumps(asdict(Process.own())))
        _wait(self._asking, [_key("process", 0)], timedelta(seconds=patience))
        self.first = _processes(self._asking, [0])
        self._thread = threading.Thread(target=self._listen, name="hang-peers", daemon=True)
        self._thread.start()

    def ask(self) -> bool:
        """Makes every rank report and decide; returns whether that has happened, in bounded time."""
        turn = self._turn
        keys = [_key(turn, rank) for rank in range(self.size)]
        threading.Thread(target=self._set, args=(keys, _ASKED), daemon=True).start()
        end = time.monotonic() + 2 * self.patience + 1
        while self._turn == turn and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        return self._turn > turn

    def stop(self) -> None:
        """Ends the thread: one that still waits in the store would abort the process when Python ends."""
        self._set([_key(self._turn, self.rank)], _STOP)
        self._thread.join(self.patience)

    def processes(self) -> dict[int, Process]:
        """Returns where the ranks run; to be called when they have answered, or not."""
        return _processes(self._listening, range(self.size))

    def _set(self, keys: list[str], value: str) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with its host: the ranks notice that themselves
            self._asking.multi_set(keys, [value] * len(keys))

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # as above
            while self._answer():
                self._turn += 1

    def _answer(self) -> bool:
        """Waits until a rank asks, answers, and decides; returns False when this rank ends."""
        own = _key(self._turn, self.rank)
        while not _wait(self._listening, [own], _LONG):
            pass
        if self._listening.get(own) == _STOP.encode():
            return False
        self._listening.set(_key(self._turn, "report", self.rank), self._report().to_json())
        answers = {rank: _key(self._turn, "report", rank) for rank in range(self.size)}
        _wait(self._listening, list(answers.values()), timedelta(seconds=self.patience))
        self._decide({rank: Report.from_json(text) for rank, text in _found(self._listening, answers).items()})
        return True


def _found(store: Any, keys: Mapping[int, str]) -> dict[int, bytes]:
    return {rank: store.get(key) for rank, key in keys.items() if store.check([key])}


def _processes(store: Any, ranks: Iterable[int]) -> dict[int, Process]:
    found = _found(store, {rank: _key("process", rank) for rank in ranks})
    return {rank: Process(**json.loads(text)) for rank, text in found.items()}


def _key(*parts: object) -> str:
    return "/".join(map(str, ("megatron_smar/hangs", *parts)))


def _wait(store: Any, keys: list[str], limit: timedelta) -> bool:
    """Waits for keys; returns False after the limit.

    Raises:
        RuntimeError: The store cannot be reached.
    """
    begin = time.monotonic()
    try:
        store.wait(keys, limit)
    except RuntimeError:
        if time.monotonic() - begin < limit.total_seconds():
            raise
        return False
    return True
