# SPDX-License-Identifier: Apache-2.0
"""What `smar_overhead.py` measures: whole steps, parts of the forward pass, the backward pass, and counts."""

from __future__ import annotations

import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.generated_kernels import generated_kernels
from benchmarks.routed_training import BALANCE, BASE, SETTINGS, STRATEGY, Training


class Stopwatch:
    """Accumulates the device's time in functions, by name."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with an event recorded before and after each call."""
        import torch

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self._spans[name].append((begin, end))
            return result

        return call

    @contextmanager
    def watching(self, functions: dict[str, tuple[Any, str]]) -> Iterator[None]:
        """Measures methods within the context.

        Args:
            functions: Class and name of each method, by the name under which its time is accumulated.
        """
        with ExitStack() as stack:
            for name, (owner, attribute) in functions.items():
                stack.enter_context(patch.object(owner, attribute, self.measured(name, getattr(owner, attribute))))
            yield

    def take(self) -> dict[str, float]:
        """Returns the seconds by name since the last call; 0 for functions that did not run."""
        import torch

        torch.cuda.synchronize()
        spans, self._spans = self._spans, defaultdict(list)
        seconds = {name: sum(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in spans.items()}
        return defaultdict(float, seconds)


def slowest(values: list[float]) -> list[float]:
    """Returns the largest of each value over the ranks."""
    import torch

    tensor = torch.tensor(values, dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return tensor.tolist()


def time_triples(training: Training, name: str, triples: int, limit: float) -> dict[str, list[float]]:
    """Returns the slowest rank's seconds of every timed step, by setting; ends early after `limit` seconds."""
    import torch
    from tqdm import tqdm

    times: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for setting in (*SETTINGS, *SETTINGS):  # warm up, so that every buffer and the optimizer's state exist
        training.seconds(setting)
    for triple in tqdm(range(triples), desc=f"{name}: triples", disable=torch.distributed.get_rank() > 0):
        for setting in SETTINGS if triple % 2 == 0 else reversed(SETTINGS):
            times[setting].append(training.seconds(setting))
        spent = sum(map(sum, times.values()))
        if triple > 0 and slowest([spent])[0] > limit:  # the same value on all ranks, so that they stop together
            break
    return {setting: slowest(values) for setting, values in times.items()}


def time_parts(training: Training, rounds: int) -> dict[str, float]:
    """Returns seconds per step in the parts of the strategy's forward pass and in `global_aux_loss`.

    Each is the median over rounds, of the slowest rank.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_smar.routing.modality_bias import ModalityBias
    from megatron_smar.routing.router import ModalityAwareRouter
    from megatron_smar.routing.statistics import PendingStatistics

    watch, rows = Stopwatch(), defaultdict(list)
    functions: dict[str, tuple[Any, str]] = {
        "gate": (TopKRouter, "gating"),
        "gating": (ModalityAwareRouter, "gating"),
        "megatron": (TopKRouter, "routing"),
        "routing": (ModalityAwareRouter, "routing"),
        "bias": (ModalityBias, "forward"),
        "launch": (PendingStatistics, "__init__"),
        "wait": (PendingStatistics, "wait"),
        "finish": (ModalityAwareRouter, "finish"),
    }
    with watch.watching(functions):
        for _ in range(rounds):
            taken = {}
            for setting in SETTINGS:
                training.seconds(setting)
                taken[setting] = watch.take()
            own = taken[STRATEGY]
            rows["logits"].append(own["gating"] - own["gate"])
            rows["modality_bias"].append(own["bias"])
            rows["statistics"].append(own["routing"] - own["megatron"] - own["bias"] - own["launch"])
            rows["launch"].append(own["launch"])
            rows["exposed_wait"].append(own["wait"])
            rows["distance_and_losses"].append(own["finish"] - own["wait"])
            rows["global_aux_loss"].append(taken[BALANCE]["megatron"] - taken[BASE]["megatron"])
    return dict(zip(rows, slowest([statistics.median(values) for values in rows.values()]), strict=True))


def time_backward(training: Training, rounds: int) -> dict[str, float]:
    """Returns the seconds that each setting adds to the backward pass of all routers; median, slowest rank.

    Measured from the router's output to its input and its parameters, on the tensors of a real step.
    """
    import torch

    from megatron_smar.routing.router import ModalityAwareRouter

    inputs: list[tuple[Any, Any, Any, dict[str, Any]]] = []
    original = ModalityAwareRouter.forward

    def remember(router: Any, hidden: Any, padding_mask: Any = None) -> Any:
        by_layer = {"sample_ids": router.sample_ids, "scores": router.scores}  # set by the MoE layer before a pass
        inputs.append((router, hidden.detach(), padding_mask, by_layer))
        return original(router, hidden, padding_mask)

    with patch.object(ModalityAwareRouter, "forward", remember):
        training.seconds(STRATEGY)
    watch, rows = Stopwatch(), defaultdict(list)
    for _ in range(rounds):
        for setting in SETTINGS:
            training.use(setting)
            for router, hidden, mask, by_layer in inputs:
                vars(router).update(by_layer)
                leaf = hidden.clone().requires_grad_()
                leaves = [leaf, *(parameter for parameter in router.parameters() if parameter.requires_grad)]
                output = router.finish(router(leaf, mask)[0])
                backward = watch.measured(setting, torch.autograd.grad)
                backward(output, leaves, torch.ones_like(output), allow_unused=True)
                vars(router).update(dict.fromkeys(by_layer))
            for name, value in watch.take().items():
                rows[name].append(value)
    none, *others = slowest([statistics.median(rows[setting]) for setting in SETTINGS])
    return {setting: other - none for setting, other in zip(SETTINGS[1:], others, strict=True)}


def count(training: Training) -> dict[str, dict[str, float]]:
    """Counts what one step dispatches per MoE layer in excess of the setting `none`, by setting.

    Returns:
        `collectives`; `floats`, the number of floats that they reduce; `operations`, in forward and backward without
        views, which is about the number of kernels on a GPU; `kernels`, where torch compiles the routing's functions.
    """
    counts = {}
    for setting in SETTINGS:
        training.use(setting)
        counts[setting] = dispatched(training.step)
        counts[setting]["kernels"] = counts[setting]["operations"] - kernels_saved(training)
    none, layers = counts[BASE], len(training.routers)  # one micro-batch per step
    return {
        setting: {name: (value - none[name]) / layers for name, value in counts[setting].items()}
        for setting in SETTINGS[1:]
    }


def dispatched(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Returns the `collectives`, `floats` and `operations` (as in `count`) that a call dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = dict.fromkeys(("collectives", "floats", "operations"), 0)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                counts["collectives"] += 1
                if "allreduce" in func.__name__:
                    counts["floats"] += sum(tensor.numel() for tensor in args[0])
            elif not func.is_view:
                counts["operations"] += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        function(*args)
    return counts


def kernels_saved(training: Training) -> int:
    """Returns how many operations more than kernels the routing's compiled functions have in one step."""
    import torch

    from megatron_smar.routing.fusion import FusedFunction

    calls: list[tuple[FusedFunction[Any], tuple[Any, ...]]] = []

    def remember(function: FusedFunction[Any], *args: Any) -> Any:
        calls.append((function, args))
        return function.function(*args)

    with patch.object(FusedFunction, "__call__", remember):
        training.step()
    kernels = generated_kernels(dict(calls))
    with torch.no_grad():
        operations = {function: dispatched(function.function, *args)["operations"] for function, args in calls}
    return sum(operations[function] - len(kernels[function]) for function, _ in calls)


def percent_over(times: list[float], base: list[float]) -> tuple[float, list[float]]:
    """Returns median and quartiles, in percent, of how much longer steps took than the base steps of their triples."""
    overheads = [100 * (time / of - 1) for time, of in zip(times, base, strict=True)]
    lower, median, upper = statistics.quantiles(overheads, n=4, method="inclusive")
    return median, [lower, upper]
