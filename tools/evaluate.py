# SPDX-License-Identifier: Apache-2.0
"""`megatron-smar-evaluate` from a checkout; described by --help and megatron_smar/commands/evaluate.py."""

import sys
from pathlib import Path

# Instead of this folder, in which the harness would find this file as the package `evaluate`.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_smar.commands.evaluate import main

if __name__ == "__main__":
    main()
