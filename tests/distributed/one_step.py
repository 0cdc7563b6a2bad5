# SPDX-License-Identifier: Apache-2.0
"""One training step on a given global batch, under whatever layout the flags ask for; the result is a checkpoint.

torchrun ... one_step.py BATCH.pt SAVE_DIR [--only-save] <flags of pretrain_vlm.py>
"""

import sys

from megatron_smar import runtime

runtime.install()

import torch  # noqa: E402
from megatron.core.distributed import finalize_model_grads  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402
from megatron.training import get_args  # noqa: E402
from megatron.training.checkpointing import save_checkpoint  # noqa: E402
from megatron.training.training import train_step  # noqa: E402

from megatron_smar.data.batch import VisionLanguageBatch  # noqa: E402
from megatron_smar.training.providers import make_forward_step  # noqa: E402
from megatron_smar.training.setup import start  # noqa: E402


def micro_batch(batch: dict, rows: slice) -> VisionLanguageBatch:
    """These rows of the global batch, with their tiles."""
    pixels = [batch["pixels"][row] for row in range(rows.start, rows.stop)]
    return VisionLanguageBatch(
        __key__=[str(row) for row in range(rows.start, rows.stop)],
        __restore_key__=(),
        input_ids=batch["ids"][rows],
        labels=batch["labels"][rows],
        loss_mask=batch["mask"][rows],
        padding_mask=batch["padding"][rows],
        pixel_values=torch.cat(pixels),
    )


def main() -> None:
    path, save, *flags = sys.argv[1:]
    only_save = flags[:1] == ["--only-save"]
    model, optimizer, scheduler = start(flags[only_save:])
    args = get_args()
    args.save, args.curr_iteration = save, 0
    if not only_save:
        batch = torch.load(path)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        share = len(batch["ids"]) // groups.dp.size()
        mine = micro_batch(batch, slice(groups.dp.rank() * share, (groups.dp.rank() + 1) * share))
        config = get_model_config(model[0])
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        for chunk in model:
            chunk.train()
        losses, *_ = train_step(
            make_forward_step(batch["image_token_id"], batch["tokens_per_tile"]),
            [RerunDataIterator(iter([mine])) for _ in model] if len(model) > 1 else RerunDataIterator(iter([mine])),
            model,
            optimizer,
            scheduler,
            config,
            get_forward_backward_func(),
            iteration=0,
        )
        if losses:
            print(f"lm loss {float(losses['lm loss']):.9f}", flush=True)
    save_checkpoint(1, model, optimizer, scheduler, 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
