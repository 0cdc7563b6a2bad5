# SPDX-License-Identifier: Apache-2.0
"""Runs pretrain_vlm.py with one rank that gets stuck or is slow, which HANG in the environment defines: kind, rank.

- `save` waits forever for a file while its first checkpoint is saved;
- `long save` writes a mebibyte every half second, for twelve seconds;
- `lock` calls in its third step a C function that keeps Python's lock and never returns;
- `slow` sleeps before each of its forward passes.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_vlm  # isort: skip  (it adapts torch and Megatron before they are imported)
import megatron.training.training as training
from megatron.training import get_args

KIND, RANK = os.environ["HANG"].split(",")
IS_STUCK = os.environ["RANK"] == RANK


def stuck_save(*args, **kwargs):
    folder = Path(get_args().save)
    if IS_STUCK and KIND == "save":
        os.mkfifo(folder / "fifo")
        (folder / "fifo").open()  # until somebody writes
    if IS_STUCK and KIND == "long save":
        with (folder / "long").open("wb", buffering=0) as file:
            for _ in range(24):
                file.write(bytes(1 << 20))
                time.sleep(0.5)
    return save(*args, **kwargs)


def build_stuck_step():
    forward = build_step()

    def stuck_step(iterator, model):
        if IS_STUCK and KIND == "lock" and get_args().curr_iteration == 2:
            time.sleep(1)  # until the watch has seen that the limit of later steps applies
            ctypes.PyDLL(None).sleep(1000)
        if IS_STUCK and KIND == "slow":
            time.sleep(0.1)
        return forward(iterator, model)

    return stuck_step


save, build_step = training.save_checkpoint, pretrain_vlm.build_forward_step
training.save_checkpoint, pretrain_vlm.build_forward_step = stuck_save, build_stuck_step
pretrain_vlm.main()
