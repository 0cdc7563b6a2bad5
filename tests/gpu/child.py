# SPDX-License-Identifier: Apache-2.0
"""Runs one step in its own process; runner.py starts `python -m tests.gpu.child MODULE:FUNCTION CONTEXT RESULT`."""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from tests.gpu.context import Context, Findings
from tests.gpu.plan import function_at
from tests.gpu.programs import ProgramError


def main() -> None:
    """Runs the step and writes its findings; a step that raises has failed."""
    place, context_path, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    context = Context.load(context_path)
    findings = Findings(context.factor)
    try:
        function_at(place)(context, findings)
    except ProgramError as error:
        findings.failures.append(str(error))
    except Exception as error:
        traceback.print_exc()
        findings.failures.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    result.write_text(json.dumps(asdict(findings), default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
