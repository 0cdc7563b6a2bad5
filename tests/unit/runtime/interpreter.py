# SPDX-License-Identifier: Apache-2.0
"""Code in an interpreter of its own, since what the runtime adapts lasts as long as the process."""

import json
import subprocess
import sys
from collections.abc import Mapping

from tests.launch import ROOT

ALL = """
import json, sys, traceback
failed = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code, {})
    except Exception:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""


def python(code: str, words: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with words on its command line."""
    base = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, env=base | environment, capture_output=True, text=True, timeout=120)


def failures(parts: Mapping[str, str], **environment: str) -> dict[str, str]:
    """Runs several pieces of code in one fresh interpreter; returns the tracebacks of those that fail, by name.

    An interpreter imports for many seconds.
    """
    done = python(ALL, words=(json.dumps(parts),), **environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
