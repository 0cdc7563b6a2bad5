# SPDX-License-Identifier: Apache-2.0
"""Asks a model one question, about a picture or none, and shows the answer while it is made.

    python tools/chat.py CHECKPOINT_OR_EXPORT "What is in the picture?" --image photograph.jpg

A checkpoint needs no flags: its run's arguments are in it. `megatron-smar-chat` is the same program, installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # run from the project's folder, without installing it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_smar.chat import main

if __name__ == "__main__":
    main()
