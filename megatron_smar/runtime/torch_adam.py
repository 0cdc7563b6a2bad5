# SPDX-License-Identifier: Apache-2.0
"""Fixes for Megatron's optimizers where they use torch's AdamW: without Transformer Engine and apex.

AdamW is the optimizer itself or, with --optimizer-cpu-offload, the part of HybridDeviceOptimizer on the host.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_smar.runtime.adaptation import Where, adaptation


def _torch_adams(optimizer: Any) -> list[torch.optim.Adam]:
    """Returns torch's AdamW optimizers in an optimizer: itself, or those inside an offloaded optimizer."""
    parts = getattr(optimizer, "sub_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, torch.optim.Adam)]


def _is_torch_adam(optimizer: Any) -> bool:
    """Returns whether an optimizer is torch's AdamW or consists of such, possibly without any parameters."""
    return isinstance(optimizer, torch.optim.Adam) or hasattr(optimizer, "sub_optimizers")


def _step_count(steps: float, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Returns AdamW's `step` of one parameter: on the parameter's device for fused kernels, on the host otherwise."""
    return torch.tensor(steps, dtype=torch.float32, device=parameter.device if group.get("fused") else "cpu")


@adaptation(
    "without Transformer Engine and apex, Megatron uses torch's AdamW unfused, which makes many passes over memory",
    Where.TORCH_ADAM,
)
def fuse_adamw() -> None:
    """Makes the optimizer that `pretrain()` builds use AdamW's fused kernels: the same update in one pass."""
    import megatron.training.training as training

    build = training.get_megatron_optimizer

    @functools.wraps(build)
    def build_fused(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            inner = getattr(part, "optimizer", None)
            if _is_torch_adam(inner):
                for group in inner.param_groups:  # type: ignore[union-attr]
                    group["fused"] = True
                inner.register_step_post_hook(_count_step)  # type: ignore[union-attr]
        return optimizer

    training.get_megatron_optimizer = build_fused


@adaptation(
    "the distributed optimizer reads the step from AdamW's state, which is empty before the first step or without "
    "parameters",
    Where.TORCH_ADAM,
)
def start_state_of_distributed_adamw() -> None:
    """Makes `DistributedOptimizer.state_dict()` work before the first step, and without parameters.

    A rank has no parameters if its shard, or its entire pipeline stage, has nothing to train. With apex or Transformer
    Engine, Megatron 0.19.2 handles both cases itself.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict = DistributedOptimizer.state_dict

    @functools.wraps(state_dict)
    def state_dict_from_start(self: Any) -> Any:
        if _is_torch_adam(self.optimizer) and not self.optimizer.state:
            _make_state(self.optimizer)
        with _step_without_parameters(self.optimizer):
            return state_dict(self)

    DistributedOptimizer.state_dict = state_dict_from_start


def _make_state(optimizer: Any) -> None:
    """Creates the state of an AdamW that has not made a step yet."""
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": _step_count(0.0, parameter, group),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    if hasattr(optimizer, "sub_optimizers"):
        optimizer._sync_sub_optimizers_state_to_hdo()


@contextlib.contextmanager
def _step_without_parameters(optimizer: Any) -> Iterator[None]:
    """Gives an AdamW without parameters, within the context, a state that holds its number of steps."""
    hides = _is_torch_adam(optimizer) and not optimizer.state
    if hides:
        optimizer.state["no parameter"] = {"step": torch.tensor(float(getattr(optimizer, "steps_made", 0)))}
    try:
        yield
    finally:
        if hides:
            del optimizer.state["no parameter"]


def _count_step(optimizer: Any, *_: Any) -> None:
    optimizer.steps_made = getattr(optimizer, "steps_made", 0) + 1


@adaptation(
    "the distributed optimizer loads in place into views of leaf tensors, and lets all parameters share one `step`, "
    "which each then increments",
    Where.TORCH_ADAM,
)
def load_distributed_adamw() -> None:
    """Runs `DistributedOptimizer.load_state_dict()` under `no_grad` and gives each parameter its own `step`."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(load_state_dict)
    def load_and_separate(self: Any, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            load_state_dict(self, state_dict)
        if _is_torch_adam(self.optimizer):
            step = float(state_dict["optimizer"]["param_groups"][0]["step"])
            self.optimizer.steps_made = int(step)
            for adam in _torch_adams(self.optimizer):
                for group in adam.param_groups:
                    group["fused"] = True  # a checkpoint written with FusedAdam does not have this key
                    for parameter in group["params"]:
                        adam.state[parameter]["step"] = _step_count(step, parameter, group)

    DistributedOptimizer.load_state_dict = load_and_separate


@adaptation(
    "fully reshardable states store AdamW's `step` separately, but torch's optimizer keeps it with the moments",
    Where.TORCH_ADAM,
)
def load_adamw_of_any_layout() -> None:
    """Loads `--dist-ckpt-optim-fully-reshardable` checkpoints; `load_distributed_adamw` then sets the steps."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def set_those_given(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None} | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_those_given


@adaptation(
    "without their multi-tensor kernels Megatron copies each gradient's norm from the device separately, and scales "
    "the gradients one after another",
    Where.TORCH_ADAM,
)
def clip_gradients_at_once() -> None:
    """Reads the gradient norm once per step, and scales all gradients in place in one operation."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.training.utils.common_utils as parameter_norm  # for --log-params-norm

    clip_grads.l2_norm_impl = parameter_norm.multi_tensor_l2norm = l2_norm
    clip_grads.multi_tensor_scale_impl = scale


def l2_norm(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Returns the norm over all tensors, [1] float32 on their device (signature of apex's multi_tensor_l2norm)."""
    norms = torch.stack(torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors]))
    return torch.linalg.vector_norm(norms.float()).unsqueeze(0), None


def scale(chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Writes the first list's tensors, scaled, to the second list's (signature of apex's multi_tensor_scale)."""
    sources, targets = tensor_lists
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor)


ADAPTATIONS = (
    fuse_adamw,
    start_state_of_distributed_adamw,
    load_distributed_adamw,
    load_adamw_of_any_layout,
    clip_gradients_at_once,
)
