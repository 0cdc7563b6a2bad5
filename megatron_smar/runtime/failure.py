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
from typing import NoReturn

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun sets it for each rank


def end(sentence: str, status: int = 1) -> NoReturn:
    """Ends this rank with one sentence, in one write: several ranks share the terminal.

    Under torchrun a node's first rank speaks on the terminal, and every rank in torchrun's report.

    Args:
        sentence: What is wrong, and what to do.
        status: The exit status.
    """
    line = f"{os.path.basename(sys.argv[0])}: error: {sentence}"
    reported = _report(line)
    if not reported or os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    sys.exit(status)


def _report(line: str) -> bool:
    """Writes torchrun's error file, in the form of `torch.distributed.elastic`'s own; whether there is one."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return False
    details = {"py_callstack": line, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": details}}), encoding="utf-8")
    except OSError:  # the line on the terminal is what counts
        return False
    return True
