# SPDX-License-Identifier: Apache-2.0
"""Ends a rank with one sentence, on the terminal and in torchrun's report.

torchrun writes a report and its own Python traceback whenever a rank ends with a nonzero status; a rank cannot prevent
that. But a rank can write its reason to torchrun's error file: the report then ends with that sentence as its root
cause, instead of advice on tracebacks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun sets it for each rank
_ENDS = ("closed by peer", "reset by peer", "Broken pipe")  # Gloo's messages for a lost connection


def end(sentence: str, status: int = 1) -> NoReturn:
    """Ends this rank with one sentence, in a single write because several ranks share the terminal.

    Under torchrun only a node's first rank writes to the terminal; every rank writes to torchrun's report.

    Args:
        sentence: What is wrong and how to fix it.
        status: Exit status of the process.
    """
    _say(sentence)
    sys.exit(status)


def end_at_once(sentence: str, status: int) -> NoReturn:
    """Ends this process with one sentence without returning to its main thread, which may never run again."""
    _say(sentence)
    os._exit(status)


def explain_lost_connections() -> None:
    """Makes a rank that lost its connection to another end with a sentence that says where to look.

    An error on a single rank (a file missing on its node, a failing disk) ends that rank with its own sentence; the
    other ranks notice in their next collective, and would print Gloo's traceback.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _lost_connection(error):
            # One second later than the cause: torchrun takes the earliest error, in full seconds, for the root cause.
            _say("another rank ended first, and what it said is the reason; this one lost its connection to it.", 1)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _lost_connection(error: BaseException) -> bool:
    """Returns whether this is Gloo's error for a peer process that has ended."""
    words = str(error)
    return isinstance(error, RuntimeError) and "gloo/transport/tcp" in words and any(end in words for end in _ENDS)


def _say(sentence: str, later: int = 0) -> None:
    line = f"{os.path.basename(sys.argv[0])}: error: {sentence}"
    reported = _report(line, int(time.time()) + later)
    if not reported or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _report(line: str, timestamp: int) -> bool:
    """Writes torchrun's error file in the format of `torch.distributed.elastic`; returns whether it was written."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    details = {"py_callstack": line, "timestamp": str(timestamp)}
    try:
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}), encoding="utf-8")
    except OSError:  # the sentence is written to the terminal instead
        return False
    return True
