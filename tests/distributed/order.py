# SPDX-License-Identifier: Apache-2.0
"""Prints the order of operations in the MoE layers, as the events of one forward and backward pass on two ranks.

torchrun --nproc-per-node 2 order.py <flags of pretrain_vlm.py>

Events: `bias`, `statistics`, `launch` (any all-reduce as large as the statistics'), `dispatch`, `experts`, `combine`,
`finish`, `wait`, and `backward` where that pass begins. Operations that make the host wait for a device are refused in
this project's code: the modality bias, the sums and their launch, `finish`.
"""

import json
import sys
from typing import Any

from megatron_smar import runtime

runtime.install()

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_smar.routing.router import ModalityAwareRouter
from megatron_smar.routing.statistics import PendingStatistics
from megatron_smar.training.setup import start

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


class NoSynchronisation(TorchDispatchMode):
    """Raises on operations whose result or shape the host must read from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for part in args[1:] for i in _flat(part)
        )
        if name in SYNCHRONISING or by_mask:
            raise AssertionError(f"{name} synchronizes host and device")
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> list[Any]:
    return [x for part in value for x in _flat(part)] if isinstance(value, list | tuple) else [value]


def watch(
    target: Any, name: str, event: str, events: list[str], guarded: bool = False, size: int | None = None
) -> None:
    """Records the calls of a function; with `size`, only calls with a tensor of that many elements."""
    function = getattr(target, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if size is None or args[0].numel() == size:
            events.append(event)
        if not guarded:
            return function(*args, **kwargs)
        with NoSynchronisation():
            return function(*args, **kwargs)

    setattr(target, name, watched)


def main() -> None:
    model, _, _ = start(sys.argv[1:])
    chunk = unwrap_model(model)[0].train()
    events: list[str] = []
    modalities, experts = chunk.modality_routing.num_modalities, chunk.config.num_moe_experts
    watch(dist, "all_reduce", "launch", events, size=modalities * (2 * experts + 1))
    watch(PendingStatistics, "wait", "wait", events)
    for layer in chunk.language_model.decoder.layers:
        moe = layer.mlp
        watch(moe.token_dispatcher, "token_dispatch", "dispatch", events)
        watch(moe.experts, "forward", "experts", events)
        watch(moe.token_dispatcher, "token_combine", "combine", events)
        watch(moe.router.modality_bias, "forward", "bias", events, guarded=True)
        watch(moe.router, "_launch_statistics", "statistics", events, guarded=True)
        watch(moe.router, "finish", "finish", events, guarded=True)
        assert isinstance(moe.router, ModalityAwareRouter)
    ids = torch.randint(6, 128, (2, 32), generator=torch.Generator().manual_seed(dist.get_rank()))
    ids[:, 4:8] = 5
    output = chunk(
        input_ids=ids,
        position_ids=torch.arange(32).expand_as(ids),
        modality_ids=(ids == 5).to(torch.int8),
        pixel_values=torch.randn(2, 3, 32, 32),
        vision_index=torch.where(ids == 5, ((ids == 5).flatten().cumsum(0) - 1).view_as(ids), -1),
        labels=ids,
    )
    events.append("backward")
    output.mean().backward()
    if dist.get_rank() == 0:
        print("EVENTS " + json.dumps(events), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
