# SPDX-License-Identifier: Apache-2.0
"""Runs training steps on given global batches, each job with the parallel layout of its flags.

torchrun --nproc-per-node N steps.py JOBS.json

Each job is {"batches", "folder", "save_before", "dtype", "flags"}. It trains from the step of the checkpoint in --load,
or from the first step, to --train-iters, on one batch after another. It writes to its folder a checkpoint every
--save-interval steps and after the last step, with `save_before` also a checkpoint before the first step (`start`), and
finally the logged values of each step (`values.json`). A job that fails writes `error.txt` and ends the program, which
continues with the next job when started again.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from megatron_smar import runtime

runtime.install()

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_model_config
from megatron.training import get_args
from megatron.training.checkpointing import save_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.training import (
    destroy_global_state,
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    setup_model_and_optimizer,
    should_disable_forward_pre_hook,
    train_step,
)

from megatron_smar.config.build import get_run_config
from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.training.batch import read_ahead
from megatron_smar.training.providers import make_forward_step, model_provider, release_model
from megatron_smar.training.setup import parse_arguments

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Values(dict[str, float]):
    """Records what Megatron would write to TensorBoard."""

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        self[name] = float(value)

    def add_image(self, *args: Any, **kwargs: Any) -> None:
        """Ignores images, which repeat the scalars."""


def micro_batches(batch: dict[str, Any], rank: int, ranks: int) -> list[VisionLanguageBatch]:
    """Returns this replica's rows of every micro-batch step; all layouts split the global batch into the same steps."""
    rows = len(batch["ids"]) // get_num_microbatches()
    share = rows // ranks
    starts = [step * rows + rank * share for step in range(get_num_microbatches())]
    return [_rows(batch, slice(start, start + share)) for start in starts]


def _rows(batch: dict[str, Any], rows: slice) -> VisionLanguageBatch:
    return VisionLanguageBatch(
        __key__=[str(row) for row in range(rows.start, rows.stop)],
        __restore_key__=(),
        input_ids=batch["ids"][rows],
        labels=batch["labels"][rows],
        loss_mask=batch["mask"][rows],
        padding_mask=batch["padding"][rows],
        pixel_values=torch.cat(batch["pixels"][rows]),
        lengths=torch.tensor(batch["lengths"][rows.start]) if batch["lengths"] else None,
    )


def step(batch: dict[str, Any], iteration: int, model: list[Any], optimizer: Any, scheduler: Any) -> Values:
    """Runs one optimizer step as `pretrain()` does, and returns what `pretrain()` would log."""
    args, groups = get_args(), ProcessGroupCollection.use_mpu_process_groups()
    mine = micro_batches(batch, groups.dp.rank(), groups.dp.size())
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if args.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in model]
        config.no_sync_func = syncs if len(model) > 1 else syncs[0]
    weighting = get_run_config().loss_weighting
    read = [read_ahead(iter(mine), groups.dp, args.calculate_per_token_loss, weighting) for _ in model]
    iterators = [RerunDataIterator(iterator) for iterator in read]
    for chunk in model:
        chunk.train()
    losses, *_ = train_step(
        make_forward_step(batch["placeholders"], batch["tokens_per_tile"]),
        iterators if len(model) > 1 else iterators[0],
        model,
        optimizer,
        scheduler,
        config,
        get_forward_backward_func(),
        iteration=iteration,
    )
    values = Values({name: float(value) for name, value in losses.items()})
    values["learning rate"] = max(group["lr"] for group in optimizer.param_groups)
    get_moe_metrics_tracker().report(
        1 / get_num_microbatches(),
        args.log_interval,  # a step at which everything is written
        values,
        per_layer_logging=True,
        force_initialize=True,
        track_names=["global_load_balancing_loss" if "global_aux_loss" in _balancing() else "load_balancing_loss"],
        num_layers=args.num_layers,
        moe_layer_freq=args.moe_layer_freq,
        mtp_num_layers=args.mtp_num_layers,
        pg_collection=groups,
    )
    return values


def _balancing() -> list[str]:
    kinds = get_args().moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else kinds


def save(iteration: int, model: list[Any], optimizer: Any, scheduler: Any) -> None:
    """Saves a checkpoint as Megatron's loop does: an all-gather of parameters may be in progress."""
    hooked = should_disable_forward_pre_hook(get_args())
    if hooked:
        disable_forward_pre_hook(model, optimizer)
    save_checkpoint(iteration, model, optimizer, scheduler, 0)
    if hooked:
        enable_forward_pre_hook(model)


def run_job(job: dict[str, Any]) -> None:
    """Runs one job in its own process group and with its own Megatron state."""
    folder = Path(job["folder"])
    dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=RANK, world_size=RANKS)
    args = parse_arguments(job["flags"], needs_data=False)
    if job["dtype"] == "float64":
        args.params_dtype = torch.float64
    initialize_megatron()
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        model_provider_func=model_provider,
        checkpointing_context={},
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if job["save_before"]:
        args.save = str(folder / "start")
        save_checkpoint(1, model, optimizer, scheduler, 0)
    args.save = str(folder)
    batches, values = [torch.load(batch) for batch in job["batches"]], []
    for iteration in range(args.iteration, args.train_iters):
        args.curr_iteration = iteration
        values.append(step(batches[iteration % len(batches)], iteration, model, optimizer, scheduler))
        args.consumed_train_samples += args.global_batch_size
        if iteration + 1 == args.train_iters or (args.save_interval and (iteration + 1) % args.save_interval == 0):
            save(iteration + 1, model, optimizer, scheduler)
    dist.barrier()
    if RANK == RANKS - 1:  # the last pipeline stage has the loss
        (folder / "values.json").write_text(json.dumps(values))
    dist.barrier()
    release(model)
    del model, optimizer, scheduler
    destroy_global_state()
    dist.destroy_process_group()
    gc.collect()


def release(model: list[Any]) -> None:
    """Lets a finished job's model be collected: its process groups have 57 threads of Gloo's, which slow later jobs.

    DDP's hooks and the graph that Megatron's dispatchers keep of their last pass form cycles through autograd's nodes,
    which Python's collector does not see.
    """
    for chunk in model:
        chunk.grad_accs.clear()
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                vars(module.token_dispatcher).clear()
    release_model()


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(job["folder"])
        if (folder / "values.json").exists() or (folder / "error.txt").exists():
            continue
        folder.mkdir(exist_ok=True)
        try:
            run_job(job)
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    main()
