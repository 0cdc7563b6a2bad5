# SPDX-License-Identifier: Apache-2.0
"""Fixes for faults of Megatron, torch and energon that also occur with GPUs: on every device, or on CUDA only."""

from __future__ import annotations

import functools
import os
import pickle
import queue
import types
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_smar.runtime import unpickling
from megatron_smar.runtime.adaptation import Where, adaptation

DATA_CLASSES = ("CrudeWebdataset", "Metadataset", "MetadatasetV2")


@adaptation(
    "the wheel has the dataset helpers compiled and no Makefile for them; rank 0 exits, and the others wait for it",
    Where.ANYWHERE,
)
def skip_compiling_helpers() -> None:
    """Compiles Megatron's indexed-dataset helper only in a source installation, which has its sources and Makefile."""
    import megatron.core.datasets.utils as utils

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None


@adaptation(
    "the first save of a run starts a process for a queue, which imports everything again: ten seconds or more",
    Where.ANYWHERE,
)
def collect_results_of_a_save_in_the_process() -> None:
    """Collects the results of a save's threads in a plain queue: all saves are written by the rank's own process."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem

    filesystem.get_write_results_queue = lambda mp_mode="spawn": queue.Queue()


@adaptation(
    "NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: float32 routers, modality biases and the sums of the "
    "routing statistics would be rounded to 10 bits, as torch's default rounds float32 convolutions",
    Where.CUDA,
    needed_by="torch 2.11 to 2.13",
)
def keep_float32_products() -> None:
    """Computes matrix products and convolutions of float32 tensors in float32; those of bf16 are not affected."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@adaptation(
    "cuDNN's attention, torch's first choice on an H100 or H200, gives NaN as the query's gradient where there is a "
    "mask, as under context parallelism, for some lengths if every score of a row is low (pytorch/pytorch#196678)",
    Where.CUDA,
    needed_by="torch 2.11 to 2.13",
)
def leave_out_cudnn_attention() -> None:
    """Makes torch choose among its other kernels of attention: flash, memory-efficient, and plain products."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@adaptation(
    "the offloaded optimizer pins its copies of the parameters before it converts them to float32, which unpins them: "
    "copying them back to the GPU then blocks the host",
    Where.CUDA,
)
def pin_offloaded_parameters() -> None:
    """Keeps the float32 parameters of --optimizer-cpu-offload in pinned memory, as --pin-cpu-params requests."""
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    split_parameters = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(split_parameters)
    def split_and_pin(self: Any, offload_fraction: float) -> Any:
        parts = split_parameters(self, offload_fraction)
        copies = parts[3]  # copy on the host -> parameter on the GPU
        for copy in copies if self.pin_cpu_params else ():
            copy.data = copy.data.pin_memory()
        return parts

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_and_pin


@adaptation(
    "Megatron's SFT and multimodal tokenizers do not pass trust_remote_code=False, and transformers then asks on the "
    "terminal, where any input that begins with y runs a model folder's code",
    Where.ANYWHERE,
    needed_by="megatron-core 0.19.2, transformers 5",
)
def never_ask_to_run_a_models_code() -> None:
    """Makes --trust-remote-code the only way to run the code in a model's folder; transformers never asks."""
    import transformers.dynamic_module_utils as code

    code.TIME_OUT_REMOTE_CODE = 0


@adaptation(
    "a checkpoint's .metadata is read with plain pickle, and its objects other than tensors with "
    "torch.load(weights_only=False): a checkpoint from a stranger can run any code, on every rank",
    Where.ANYWHERE,
    needed_by="torch 2.11 to 2.13",
)
def read_checkpoints_without_running_them() -> None:
    """Restricts everything that reads a checkpoint, in this process and its children, to the classes of checkpoints.

    The table of contents is read with `unpickling.load_contents`, and everything that goes through `torch.load` with
    `weights_only` and Megatron's own classes. The environment variable that disables `weights_only` is removed.
    """
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    safe_pickle = types.ModuleType(pickle.__name__, pickle.__doc__)
    vars(safe_pickle).update({name: value for name, value in vars(pickle).items() if not name.startswith("__")})
    vars(safe_pickle)["load"] = lambda file: unpickling.load_contents(file, getattr(file, "name", "the checkpoint"))
    filesystem.pickle = safe_pickle
    load_bytes, read_data = DefaultLoadPlanner.load_bytes, filesystem.FileSystemReader.read_data

    @functools.wraps(load_bytes)
    def load_admitted_bytes(self: Any, read_item: Any, value: Any) -> None:
        with torch.serialization.safe_globals(unpickling.admitted()):
            load_bytes(self, read_item, value)

    @functools.wraps(read_data)
    def read_data_or_say_which(self: Any, plan: Any, planner: Any) -> Any:
        try:
            return read_data(self, plan, planner)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            files = ", ".join(sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}))
            raise unpickling.DamagedError(
                f"{self.path} cannot be read ({unpickling.one_line(error)}, in one of {files}); "
                "the checkpoint is damaged."
            ) from error

    DefaultLoadPlanner.load_bytes = load_admitted_bytes  # type: ignore[method-assign]
    filesystem.FileSystemReader.read_data = read_data_or_say_which  # type: ignore[method-assign]


@adaptation(
    "Megatron's handler handles one signal only, so that Ctrl-C ends in tracebacks with nothing saved, and a second "
    "signal does not end the run immediately",
    Where.ANYWHERE,
)
def listen_to_all_signals_that_end_a_run() -> None:
    """Makes SIGTERM, SIGINT (Ctrl-C), SIGHUP and --exit-signal end a run after its step; a second one immediately."""
    import megatron.training.global_vars as global_vars

    from megatron_smar.runtime.signals import StopSignals  # a subclass of Megatron's, which is imported last

    global_vars.DistributedSignalHandler = StopSignals


@adaptation(
    "each parser of all flags parses the sources of Megatron's config classes for its help, which takes 0.4 s, and the "
    "start of a program makes three",
    Where.ANYWHERE,
    needed_by="megatron-core 0.19.2",
)
def read_help_of_flags_once() -> None:
    """Keeps what Megatron has read of each config class's help for the next parser."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, known = ArgumentGroupFactory._get_field_docstrings, dict[type, dict[str, str]]()

    @functools.wraps(read)
    def read_once(self: Any, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(self, config)
        return dict(known[config])  # the caller adds to it

    ArgumentGroupFactory._get_field_docstrings = read_once


@adaptation(
    "energon keeps its tar files open, and each keeps all members ever read from it (TarFile.members): memory grows "
    "by 1 KB per image without bound, and garbage collection over the members slows the loader down",
    Where.ANYWHERE,
    needed_by="megatron-energon 7.4.1",
)
def forget_members_that_were_read() -> None:
    """Clears the members of energon's tar files, which nothing reads; forked data workers inherit this change."""
    from megatron.energon.flavors.webdataset.itar import ITarFile

    read = ITarFile.next

    @functools.wraps(read)
    def read_and_forget(self: Any) -> Any:
        member = read(self)
        self.members.clear()
        return member

    ITarFile.next = read_and_forget


@adaptation(
    "energon imports whatever class or function a data folder's files name; they are checked (`data/metadataset.py`), "
    "but energon reads them again afterwards, when a server can answer something else",
    Where.ANYWHERE,
    needed_by="megatron-energon 7.4.1",
)
def import_nothing_that_data_names() -> None:
    """Makes energon resolve only its own three classes in data folders and metadatasets, and no file next to them."""
    from megatron.energon.module_loader import ModuleLoader
    from megatron.energon.typed_converter import JsonParser

    resolve = JsonParser._resolve_object

    @functools.wraps(resolve)
    def resolve_known(self: Any, module_name: str, object_name: str, *args: Any, **kwargs: Any) -> Any:
        if module_name != "megatron.energon" or object_name not in DATA_CLASSES:
            raise ValueError(f"the data names {module_name}.{object_name}, but only energon's own classes are loaded")
        return resolve(self, module_name, object_name, *args, **kwargs)

    def refuse(self: Any, function: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"the data names the function {function}, but no code from a data folder is run")

    JsonParser._resolve_object = resolve_known
    ModuleLoader.get_function = refuse


@adaptation(
    "logging the first step after a start does not reset the sums, even if a log interval ends with that step: with "
    "--log-interval 1 the second line shows the mean of two steps, for losses and time",
    Where.ANYWHERE,
)
def end_the_first_interval() -> None:
    """Logs a first step that ends a log interval in the same way as every other step that ends one."""
    import megatron.training.training as training

    log = training.training_log

    @functools.wraps(log)
    def log_interval(
        losses: Any, totals: Any, rate: Any, iteration: int, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        first = is_first_iteration and iteration % training.get_args().log_interval != 0
        return log(losses, totals, rate, iteration, *args, is_first_iteration=first, **kwargs)

    training.training_log = log_interval


@adaptation(
    "with fp16 each chained optimizer (one is the experts') lowers its own loss scale, but the loss is scaled by the "
    "first optimizer's: after an overflow in only one of two, their gradients differ by a factor of 2",
    Where.ANYWHERE,
)
def keep_one_loss_scale() -> None:
    """Changes the loss scales of chained optimizers together: all follow one that found an overflow, if any did."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    def prepare_together(self: Any) -> bool:
        found = [bool(optimizer.prepare_grads()) for optimizer in self.chained_optimizers]
        if any(found) and not all(found):
            state = _grad_scalers(self.chained_optimizers[found.index(True)])[0].state_dict()
            for scaler in _grad_scalers(self):
                scaler.load_state_dict(dict(state))
        return any(found)

    ChainedOptimizer.prepare_grads = prepare_together


@adaptation(
    "a dispatcher on one rank sorts its tokens, which are sorted by expert already, by copying all of them: in each "
    "layer before and after the experts, and in the backward pass again",
    Where.ANYWHERE,
    needed_by="megatron-core 0.19.2",
)
def copy_no_sorted_tokens() -> None:
    """Returns chunks that are in order as they are; Transformer Engine's fused kernel is left alone."""
    from megatron.core.transformer.moe import token_dispatcher

    sort = token_dispatcher.sort_chunks_by_idxs

    @functools.wraps(sort)
    def sort_unsorted(
        input: Any, split_sizes: Any, sorted_idxs: Any, probs: Any = None, fused: bool = False
    ) -> tuple[Any, Any]:
        if not fused and (order := sorted_idxs.tolist()) == sorted(order):
            return input, probs
        return sort(input, split_sizes, sorted_idxs, probs=probs, fused=fused)

    token_dispatcher.sort_chunks_by_idxs = sort_unsorted


@adaptation(
    "the cross entropy searches the index of each position's largest logit, which nothing reads: five times the time "
    "of the largest logit alone",
    Where.ANYWHERE,
    needed_by="megatron-core 0.19.2",
)
def find_largest_logits_only() -> None:
    """Computes the largest logit of each position without its index; the value is the same, bit for bit."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    def largest(vocab_parallel_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = vocab_parallel_logits.float()
        return logits, logits.amax(dim=-1)

    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(largest)


def _grad_scalers(optimizer: Any) -> list[Any]:
    """Returns the gradient scalers of an optimizer, or of all optimizers chained in it."""
    if hasattr(optimizer, "chained_optimizers"):
        return [scaler for part in optimizer.chained_optimizers for scaler in _grad_scalers(part)]
    scaler = getattr(optimizer, "grad_scaler", None)
    return [scaler] if scaler else []


ADAPTATIONS = (
    read_checkpoints_without_running_them,
    skip_compiling_helpers,
    collect_results_of_a_save_in_the_process,
    keep_float32_products,
    leave_out_cudnn_attention,
    pin_offloaded_parameters,
    never_ask_to_run_a_models_code,
    listen_to_all_signals_that_end_a_run,
    read_help_of_flags_once,
    forget_members_that_were_read,
    import_nothing_that_data_names,
    end_the_first_interval,
    keep_one_loss_scale,
    copy_no_sorted_tokens,
    find_largest_logits_only,
)
