# SPDX-License-Identifier: Apache-2.0
"""`megatron-smar-plan` from a checkout; described by --help and megatron_smar/commands/plan.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smar.commands.plan import main

if __name__ == "__main__":
    main()
