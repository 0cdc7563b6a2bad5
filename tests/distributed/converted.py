# SPDX-License-Identifier: Apache-2.0
"""Computes the logits of converted checkpoints under given layouts, all in one start of the program.

torchrun --nproc-per-node N converted.py JOBS.json

Each job is {"checkpoint", "layout", "ids", "logits"}: a folder that an import wrote, the flags of a layout, a file of
token ids [b, s], and the output file. If a job fails, its error is written next to "logits", as a text file.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from megatron_smar import runtime

runtime.install()

import torch
import torch.distributed as dist
from megatron.training.training import destroy_global_state

from megatron_smar.evaluation.verify import checkpoint_logits
from megatron_smar.training.setup import start

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SETTINGS = """
    --finetune --skip-train --micro-batch-size 2 --global-batch-size 4 --train-iters 1 --lr 1e-5 --seq-length 24
    --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 1
""".split()


def run_job(job: dict[str, str]) -> torch.Tensor:
    """Runs one job in its own process group and with its own Megatron state."""
    checkpoint, ids = Path(job["checkpoint"]), torch.load(job["ids"])
    dist.init_process_group("gloo", init_method=f"file://{job['logits']}.store", rank=RANK, world_size=RANKS)
    vocabulary = json.loads((checkpoint / "hf" / "config.json").read_text())["text_config"]["vocab_size"]
    place = ["--load", str(checkpoint), "--vision-model", str(checkpoint / "hf"), "--vocab-size", str(vocabulary)]
    flags = (checkpoint / "flags.txt").read_text().split()
    model, *_ = start([*SETTINGS, *flags, *place, *job["layout"].split()])
    logits = checkpoint_logits(model, ids, torch.zeros(0, 3, 32, 32, dtype=torch.uint8), vocabulary - 1, 4)
    dist.barrier()
    destroy_global_state()
    dist.destroy_process_group()
    return logits


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            logits = run_job(job)
        except BaseException:
            Path(job["logits"]).with_suffix(".txt").write_text(traceback.format_exc())
            raise
        if RANK == 0:
            torch.save(logits, job["logits"])


if __name__ == "__main__":
    main()
