# SPDX-License-Identifier: Apache-2.0
"""How a rank ends with one sentence, with a launcher behind it that has a report of its own.

torchrun writes a report and a Python traceback of itself whenever a rank ends with another status than 0; a rank cannot
keep it from that. What a rank can do is to say in torchrun's error file why it ended: the report then ends with the
sentence, instead of advice on tracebacks, as its root cause.
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
_ENDS = ("closed by peer", "reset by peer", "Broken pipe")  # in Gloo's words


def end(sentence: str, status: int = 1) -> NoReturn:
    """Ends this rank with one sentence, in one write: several ranks share the terminal.

    Under torchrun a node's first rank speaks on the terminal, and every rank in torchrun's report.

    Args:
        sentence: What is wrong, and what to do.
        status: The exit status.
    """
    _say(sentence)
    sys.exit(status)


def explain_lost_connections() -> None:
    """Has a rank that lost another one end with a sentence that says where to look, instead of Gloo's traceback.

    An error of one rank alone (a file that its node lacks, a failing disk) ends that rank with its own sentence; the
    others notice by their next collective.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if _lost_connection(error):
            # A second later than the reason: torchrun takes the earliest, by whole seconds, for the cause.
            _say("another rank ended first, and what it said is the reason; this one lost its connection to it.", 1)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _lost_connection(error: BaseException) -> bool:
    """Whether Gloo found that the process at the other end of a connection has gone."""
    words = str(error)
    return isinstance(error, RuntimeError) and "gloo/transport/tcp" in words and any(end in words for end in _ENDS)


def _say(sentence: str, later: int = 0) -> None:
    line = f"{os.path.basename(sys.argv[0])}: error: {sentence}"
    reported = _report(line, int(time.time()) + later)
    if not reported or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _report(line: str, timestamp: int) -> bool:
    """Writes torchrun's error file, in the form of `torch.distributed.elastic`'s own; whether there is one."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    details = {"py_callstack": line, "timestamp": str(timestamp)}
    try:
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}), encoding="utf-8")
    except OSError:  # the line on the terminal is what counts
        return False
    return True
