# SPDX-License-Identifier: Apache-2.0
"""What a run does when a signal asks it to end: it finishes its step, saves, and reports how to resume.

This extends Megatron's own handler: after each step Megatron's loop asks it, on all ranks together, whether a rank
received a signal, and saves (`checkpoint_and_decide_exit`). `StopSignals` also handles Ctrl-C and a closed terminal,
ends the run immediately at a second signal or when there is nothing to save yet, and needs no flag
(`arguments.add_arguments`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

from megatron.training.dist_signal_handler import DistributedSignalHandler

# torchrun forwards signals: if the launcher signals all processes of a job, each rank receives the same signal twice.
_ONE_REQUEST = 1.0  # seconds within which two signals count as one
_TORCHRUN = "TORCHELASTIC_RUN_ID"  # torchrun sets it for its ranks
_SLURM = "SLURM_JOB_ID"


class StopSignals(DistributedSignalHandler):
    """Megatron's signal handler, extended to all signals that ask a run to end.

    Args:
        sig: Megatron's --exit-signal, handled in addition to SIGTERM, SIGINT, SIGHUP and SIGUSR1.
    """

    current: StopSignals | None = None

    def __init__(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Creates the handler; signals are handled only after `__enter__`."""
        super().__init__(sig)
        self.training = False
        self.received: signal.Signals | None = None
        self.stopped = False
        self._first = 0.0
        self.saving = False

    def __enter__(self) -> StopSignals:
        """Installs the handlers."""
        self._signal_received = self.released = False
        self._process = os.getpid()
        self._original: dict[signal.Signals, Any] = {}
        for sig in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, self.sig}:
            if sig == signal.SIGHUP and signal.getsignal(sig) == signal.SIG_IGN:
                continue  # nohup
            self._original[sig] = signal.signal(sig, self._handle)
        StopSignals.current = self
        return self

    def release(self) -> bool:
        """Restores the handlers that were installed before."""
        if self.released:
            return False
        for sig, handler in self._original.items():
            signal.signal(sig, handler)
        self.released = True
        StopSignals.current = None
        return True

    def signals_received(self) -> list[int]:
        """Returns for each rank whether it received a signal."""
        received: list[int] = super().signals_received()
        if any(received):
            self.stopped = True
        return received

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a forked process that the launcher signaled too: its parent decides
        sig, now = signal.Signals(number), time.monotonic()
        if self._signal_received and self.saving:
            _say(f"{sig.name}: the checkpoint is being saved; only SIGKILL ends that")
        elif self._signal_received and sig != signal.SIGINT and _SLURM in os.environ:
            return  # SLURM signals a step more than once, and ends it with SIGKILL when its patience is over
        elif self._signal_received and now - self._first > (_ONE_REQUEST if _TORCHRUN in os.environ else 0.1):
            _end_at_once(f"a second {sig.name}: ended at once; what was learned since the last checkpoint is lost", sig)
        if not self.training:
            _end_at_once(f"ended by {sig.name}, with nothing to save", sig)
        if not self._signal_received:
            self._signal_received, self.received, self._first = True, sig, now
            timeout = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
            limit = f" (torchrun waits {timeout} s for that unless --shutdown-timeout says otherwise)"
            what = f"{sig.name}: the run ends after this step{limit if _TORCHRUN in os.environ else ''}"
            _say(f"{what}; a second one ends it at once")


def begin_training() -> None:
    """Tells the handler that training has begun: from now on there is something to save."""
    if StopSignals.current is not None:
        StopSignals.current.training = True


def _say(sentence: str) -> None:
    """Writes one line to the terminal, from rank 0, unbuffered: a signal handler must not wait for a buffer's lock."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{os.path.basename(sys.argv[0])}: {sentence}.\n".encode())


def _end_at_once(sentence: str, sig: signal.Signals) -> None:
    _say(sentence)
    for child in multiprocessing.active_children():  # data workers would notice only after seconds
        child.kill()
    os._exit(128 + sig)
