# SPDX-License-Identifier: Apache-2.0
"""Megatron on a machine without CUDA: what redirecting torch does not reach."""

from __future__ import annotations

import contextlib
import functools
import queue
from collections.abc import Iterator
from typing import Any

import torch

from megatron_smar.runtime.adaptation import adaptation


@adaptation("pretrain() does not pass allow_no_cuda on to initialize_megatron()")
def allow_no_cuda() -> None:
    """`pretrain()` starts on a machine without CUDA."""
    import megatron.training as package
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    start = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    for module in (package, initialize, training):
        module.initialize_megatron = start


@adaptation("the wheel has no Makefile for the dataset helpers; its compiled helper is there already")
def skip_compiling_helpers() -> None:
    """Megatron's indexed-dataset helper is not compiled again."""
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


@adaptation("tensor_parallel.random took torch.cuda's functions by name and reaches into its generators")
def keep_one_random_state() -> None:
    """Megatron's tracker of generator states switches the CPU's generator."""
    import megatron.core.tensor_parallel.random as random

    patched: Any = random
    patched._lazy_call = lambda function, **kwargs: function()
    patched._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    patched._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


@adaptation("the dispatcher asks for NumPy split sizes, and gets a tensor where there is no CUDA to copy them from")
def give_numpy_split_sizes() -> None:
    """`maybe_move_tensor_to_cpu(..., as_numpy=True)` gives NumPy for a CPU tensor too."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def as_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = as_host
    token_dispatcher.maybe_move_tensor_to_cpu = as_host


@adaptation("without Transformer Engine and apex, Megatron takes torch's AdamW in its slow form, pass after pass")
def fuse_adamw() -> None:
    """The optimizer that `pretrain()` makes uses AdamW's fused CPU kernel: the same update in one pass."""
    import megatron.training.training as training

    build = training.get_megatron_optimizer

    @functools.wraps(build)
    def build_fused(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(part, "optimizer", None)
            if isinstance(inner, torch.optim.Adam):
                for group in inner.param_groups:
                    group["fused"] = True
                inner.register_step_post_hook(_count_step)
        return optimizer

    training.get_megatron_optimizer = build_fused


@adaptation("the distributed optimizer asks AdamW for its step, which one without state or parameters does not know")
def start_state_of_distributed_adamw() -> None:
    """`DistributedOptimizer.state_dict()` works before the first step, and without parameters.

    Parameters are missing where the rank's shard, or its whole pipeline stage, has nothing to train. With apex or
    Transformer Engine, Megatron 0.19.2 handles both itself.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict

    @functools.wraps(state_dict)
    def state_dict_from_start(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam) and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        with _step_without_parameters(self.optimizer):
            return state_dict(self)

    DistributedOptimizer.state_dict = state_dict_from_start


@contextlib.contextmanager
def _step_without_parameters(optimizer: Any) -> Iterator[None]:
    """While it lasts, an AdamW without parameters has a state that tells the number of its steps."""
    hides = isinstance(optimizer, torch.optim.Adam) and not optimizer.state
    if hides:
        optimizer.state["no parameter"] = {"step": torch.tensor(float(getattr(optimizer, "steps_made", 0)))}
    try:
        yield
    finally:
        if hides:
            del optimizer.state["no parameter"]


def _count_step(optimizer: Any, *_: Any) -> None:
    optimizer.steps_made = getattr(optimizer, "steps_made", 0) + 1


@adaptation("the distributed optimizer loads into views of leaves, and gives all parameters one `step` to raise")
def load_distributed_adamw() -> None:
    """`DistributedOptimizer.load_state_dict()` runs without gradients; then each parameter counts its own steps."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_and_separate(self: Any, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            load_state_dict(self, state_dict)
        if isinstance(self.optimizer, torch.optim.Adam):
            step = float(state_dict["optimizer"]["param_groups"][0]["step"])
            self.optimizer.steps_made = int(step)  # type: ignore[attr-defined]
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(step)

    DistributedOptimizer.load_state_dict = load_and_separate


@adaptation("states that fit any layout have AdamW's `step` apart, and torch's optimizer has one beside the moments")
def load_adamw_of_any_layout() -> None:
    """A checkpoint with `--dist-ckpt-optim-fully-reshardable` loads; `load_distributed_adamw` then sets the steps."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def set_those_given(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None} | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_those_given


@adaptation("each first save starts a process for a queue, and that imports everything again: ten seconds or more")
def collect_results_of_a_save_in_the_process() -> None:
    """What a save's threads report goes through a plain queue, unless --async-save has another process write."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    from megatron.training import get_args

    get_shared_queue = filesystem.get_write_results_queue

    @functools.wraps(get_shared_queue)
    def get_queue(mp_mode: str = "spawn") -> Any:
        return get_shared_queue(mp_mode) if get_args().async_save else queue.Queue()

    filesystem.get_write_results_queue = get_queue


ADAPTATIONS = (
    allow_no_cuda,
    skip_compiling_helpers,
    keep_one_random_state,
    give_numpy_split_sizes,
    fuse_adamw,
    start_state_of_distributed_adamw,
    load_distributed_adamw,
    load_adamw_of_any_layout,
    collect_results_of_a_save_in_the_process,
)
