# SPDX-License-Identifier: Apache-2.0
"""Starts pretrain_vlm.py on a disk that takes SECONDS for each write of weights: `slow_disk.py SECONDS FLAGS...`."""

import runpy
import sys
import time
from typing import Any

from megatron_smar import runtime

runtime.install_or_exit()

from megatron_smar.reliability.manifest import HashingFile

SECONDS = float(sys.argv.pop(1))
write = HashingFile.write


def write_slowly(self: HashingFile, data: Any) -> int:
    time.sleep(SECONDS)
    return write(self, data)


HashingFile.write = write_slowly  # type: ignore[method-assign]
runpy.run_path("pretrain_vlm.py", run_name="__main__")
