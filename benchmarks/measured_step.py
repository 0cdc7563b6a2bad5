# SPDX-License-Identifier: Apache-2.0
"""What a training step does on one rank, measured: memory at its peak by part, collectives, operations.

`plan_accuracy.py` compares it with the plan.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from routed_training import Training  # benchmarks/routed_training.py
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

GROUPS = {
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "CONTEXT_PARALLEL_GROUP": "context",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tensor and context",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tokens",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert and tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "MODEL_PARALLEL_GROUP": "model",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "world",
    "default_pg": "world",
}
OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
}
PART_OF_MODULE = (  # the first that is in a module's name
    ("vision_model", "vision"),
    ("connector", "vision"),
    ("embedding", "vision"),
    ("output_layer", "output"),
    ("final_layernorm", "output"),
    (".mlp", "experts"),
    ("pre_mlp_layernorm", "experts"),
    (".layers.", "attention"),
    ("language_model", "output"),
)
SPAN, BACKWARD, STEP_ENDS = "module:", "autograd::engine", "optimizer step"
SETTLING_SECONDS = 0.02


def storages(tensors: Any) -> int:
    """Returns the bytes of the tensors' storages, each counted once."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def static_parts(training: Training) -> dict[str, int]:
    """Returns the bytes of weights, gradient buffers and the optimizer's state on this rank."""
    weights = [parameter.data for chunk in training.chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in training.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    state = []
    for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        inner = part.optimizer
        copies = [parameter.data for group in inner.param_groups for parameter in group["params"]]
        moments = [value for values in inner.state.values() for value in values.values() if torch.is_tensor(value)]
        state += [t for t in copies if t.untyped_storage().data_ptr() not in own] + [m for m in moments if m.dim()]
    gradients = storages(buffer.grad_data for buffer in buffers)
    return {"weights": storages(weights), "gradients": gradients, "optimizer": storages(state)}


def watch_modules(training: Training) -> None:
    """Records a span of the profiler around the forward pass of every module that the attribution needs."""
    for model in training.models:
        for name, module in model.named_modules():
            if "local_experts" in name:
                continue
            name = name or "embedding"  # the whole model: what its own forward pass allocates are embedded tokens
            open_spans: list[Any] = []

            def enter(module: Any, inputs: Any, name: str = name, spans: list[Any] = open_spans) -> None:
                spans.append(torch.profiler.record_function(SPAN + name))
                spans[-1].__enter__()

            def leave(module: Any, inputs: Any, output: Any, spans: list[Any] = open_spans) -> None:
                spans.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
    step = training.optimizer.step

    def marked(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(STEP_ENDS):
            return step(*args, **kwargs)

    training.optimizer.step = marked


def _added(accumulated: Any, left: Any, right: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


# The experts' gradients are added in place to the gradient buffer, an operation that torch's counter does not list.
ADDED = {torch.ops.aten.addmm_: _added}


class Collectives(TorchDispatchMode):
    """Counts the collectives that torch dispatches, by process group and operation.

    Attributes:
        calls: Number of collectives.
        bytes: Of the tensors that this rank gives; of the whole gathered tensor for all-gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts a collective and runs it."""
        if function.namespace == "c10d":
            group = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "Group" in str(arg._type()))
            tensors = [t for t in tree_flatten(args[0])[0] if isinstance(t, torch.Tensor)]
            operation = OPERATIONS[function._schema.name.removeprefix("c10d::")]
            # Neighbors of a pipeline of two exchange over two groups.
            one_way = operation in ("send", "recv")
            key = ("pipeline" if one_way else GROUPS[dist.ProcessGroup.unbox(group).group_desc], operation)
            self.calls[key] += 1
            self.bytes[key] += sum(t.numel() * t.element_size() for t in tensors)
        return function(*args, **(kwargs or {}))


def allocated_at_peak(training: Training, trace: str) -> dict[str, int]:
    """Runs a step under the profiler; returns the bytes alive at the peak of its passes, by the part that made them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        training.step()
    profiler.export_chrome_trace(trace)
    events = json.loads(Path(trace).read_text())["traceEvents"]
    last = next(event for event in events if event.get("name") == STEP_ENDS)
    end = last["ts"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["ts"] < end]
    changes.sort(key=lambda event: event["ts"])
    collectives = [event for event in events if event.get("name", "").startswith("c10d::")]
    changes = without_copies(changes, collectives, last["tid"])
    size = largest = peak = 0
    for number, event in enumerate(changes):
        size += event["args"]["Bytes"]
        if size > largest:
            largest, peak = size, number
    alive: dict[int, Any] = {}
    for event in changes[: peak + 1]:
        if event["args"]["Bytes"] > 0:
            alive[event["args"]["Addr"]] = event
        else:
            alive.pop(event["args"]["Addr"], None)
    spans = [event for event in events if event.get("ph") == "X" and event["name"].startswith((SPAN, BACKWARD))]
    parts: Counter[str] = Counter()
    for event in alive.values():
        parts[part_of_event(event, spans)] += event["args"]["Bytes"]
    return dict(parts)


def without_copies(
    changes: list[dict[str, Any]], collectives: list[dict[str, Any]], thread: int
) -> list[dict[str, Any]]:
    """Returns the allocator's events without the copies that Gloo makes, within a collective or on its own threads."""
    copies: set[int] = set()
    kept = []
    spans = sorted((span["ts"], span["ts"] + span["dur"]) for span in collectives)
    starts = [begin for begin, _ in spans]
    for event in changes:
        address, at = event["args"]["Addr"], bisect.bisect_right(starts, event["ts"]) - 1
        is_copy = event["tid"] != thread or (at >= 0 and event["ts"] <= spans[at][1])
        if event["args"]["Bytes"] > 0 and is_copy:
            copies.add(address)
        elif event["args"]["Bytes"] > 0 or address not in copies:
            copies.discard(address)
            kept.append(event)
        else:
            copies.remove(address)
    return kept


def part_of_event(event: dict[str, Any], spans: list[dict[str, Any]]) -> str:
    """Returns the part whose forward pass made an allocation, or `temporary` for the backward pass."""
    around = [s for s in spans if s["ts"] <= event["ts"] <= s["ts"] + s["dur"] and s["tid"] == event["tid"]]
    if any(span["name"].startswith(BACKWARD) for span in around):
        return "temporary"
    modules = [span for span in around if span["name"].startswith(SPAN)]
    if not modules:
        return "temporary"
    name = min(modules, key=lambda span: span["dur"])["name"]
    return next(part for fragment, part in PART_OF_MODULE if fragment in name)


def measure(training: Training, trace: str) -> dict[str, Any]:
    """Trains a few steps on this rank.

    Args:
        training: The training, whose modules get hooks.
        trace: File for the profiler's events.

    Returns:
        - parts: bytes of weights, gradients and optimizer, and those that are alive at the peak, by part;
        - routed: tokens that experts computed in the step of the peak, by layer and micro-batch, in order;
        - busiest: those of the expert that got most, likewise;
        - received: their mean in the step of the collectives;
        - collectives: [group, operation, calls, bytes] of a step;
        - operations: floating-point operations of a step.
    """
    routed: list[int] = []
    busiest: list[int] = []
    recomputes = training.models[0].config.recompute_granularity == "full"

    def count(experts: Any, inputs: Any) -> None:
        if not (recomputes and torch.is_grad_enabled()):  # what is computed again is the same in reverse order
            routed.append(inputs[0].shape[0])
            busiest.append(int(inputs[1].max()))

    for model in training.models:
        for name, module in model.named_modules():
            if name.endswith(".mlp.experts"):
                module.register_forward_pre_hook(count)
    training.step()
    training.step()
    routed.clear()
    with Collectives() as collectives:
        training.step()
    received = sum(routed) / len(routed)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=ADDED) as operations:
        training.step()
    static = static_parts(training)
    watch_modules(training)
    routed.clear()
    busiest.clear()
    with settled_exchanges():
        peak = allocated_at_peak(training, trace)
    return {
        "parts": static | peak,
        "routed": routed,
        "busiest": busiest,
        "received": received,
        "collectives": [[*key, calls, collectives.bytes[key]] for key, calls in sorted(collectives.calls.items())],
        "operations": operations.get_total_flops(),
    }


@contextlib.contextmanager
def settled_exchanges() -> Iterator[None]:
    """Within the context, exchanges of tokens return only after Gloo's threads have released their tensors.

    A thread holds them until it is scheduled again after the exchange, on busy cores until the next peak.
    """
    exchange = dist.all_to_all_single

    def settled(*args: Any, **kwargs: Any) -> Any:
        done = exchange(*args, **kwargs)
        time.sleep(SETTLING_SECONDS)
        return done

    dist.all_to_all_single = settled
    try:
        yield
    finally:
        dist.all_to_all_single = exchange
