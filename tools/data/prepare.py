# SPDX-License-Identifier: Apache-2.0
"""Runs `megatron-smar-prepare` from a checkout; see --help and megatron_smar/commands/prepare.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_smar.commands.prepare import main

if __name__ == "__main__":
    main()
