# SPDX-License-Identifier: Apache-2.0
"""All layouts of a model on a cluster, which fit, and the fastest of them with the reason why the others lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from megatron_smar.planning.cluster import GIB, Cluster
from megatron_smar.planning.duration import Duration, duration, model_operations
from megatron_smar.planning.layout import Batch, Layout, legal_layouts
from megatron_smar.planning.memory import Memory, Place, memory
from megatron_smar.planning.shape import ModelShape

# Parts of `Duration` in words.
REASONS = {
    "decoder": "more computation of the decoder",
    "vision": "the first stage waits for pictures",
    "memory": "more memory traffic",
    "experts": "a slower exchange of tokens",
    "tensor": "more sequence-parallel communication",
    "context": "more exchange of keys and values",
    "pipeline": "more sends between stages",
    "bubble": "a longer pipeline bubble",
    "data": "gradients that do not overlap",
    "optimizer": "a slower optimizer step",
}


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        shape: The model, with its parameters.
        batch: What a step trains on.
        cluster: The GPUs.
        gpus: Number of GPUs.
        imbalance: Tokens of the fullest experts, relative to an even share among those that serve the same modalities.
        host_memory: Memory of the host per GPU in GiB, for an optimizer there.
    """

    shape: ModelShape
    batch: Batch
    cluster: Cluster
    gpus: int
    imbalance: float = 1.5
    host_memory: float = 128.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.imbalance < 1 or self.host_memory < 0:
            raise ValueError(
                f"{self.gpus} GPUs, imbalance {self.imbalance}, {self.host_memory} GiB of host memory: give at least "
                "one GPU, an imbalance of at least 1, and no negative memory."
            )


@dataclass(frozen=True)
class Plan:
    """A layout with its cost.

    Attributes:
        layout: The layout.
        memory: Of the stage with most.
        duration: Of a step.
        tokens: Tokens per second and GPU, without padding.
        tflops: Model operations per second and GPU in TFLOP/s.
        fits: Whether the memory suffices.
        reason: Why it loses to the best; of the best, why it wins.
    """

    layout: Layout
    memory: Memory
    duration: Duration
    tokens: float
    tflops: float
    fits: bool
    reason: str = ""

    @property
    def seconds(self) -> float:
        """Time of a step."""
        return self.duration.total


def evaluate(request: Request, layout: Layout) -> Plan:
    """Returns a layout's cost."""
    shape, batch = request.shape, request.batch
    imbalance = layout.fullest_experts(shape, batch, request.imbalance)
    stages = [memory(shape, layout, batch, Place(s), imbalance) for s in sorted({0, layout.pipeline - 1})]
    fullest = max(stages, key=lambda one: one.device)
    time = duration(shape, layout, batch, request.cluster, fullest, imbalance, shape.strategy)
    tokens = batch.rows * batch.sequence * batch.filled
    per_gpu = time.total * layout.gpus
    fits = fullest.device <= request.cluster.memory * GIB and fullest.host <= request.host_memory * GIB
    tflops = model_operations(shape, batch).total / per_gpu / 1e12
    return Plan(layout, fullest, time, tokens / per_gpu, tflops, fits)


def search(
    request: Request,
    best: int = 10,
    watch: Callable[[Iterable[Layout]], Iterable[Layout]] = iter,
    wanted: Callable[[Layout], bool] = lambda layout: True,
) -> list[Plan]:
    """Returns the fastest layouts that fit, best first, with reasons; where none fits, the smallest ones.

    Args:
        request: What is planned.
        best: Number of layouts.
        watch: Wraps the layouts, to show progress.
        wanted: Whether a layout is to be considered.

    Raises:
        ValueError: Megatron accepts no layout.
    """
    legal = legal_layouts(request.shape, request.batch, request.gpus, request.cluster.per_node)
    layouts = [layout for layout in legal if wanted(layout)]
    if not layouts:
        one = Layout(request.gpus).problem(request.shape, request.batch)
        raise ValueError(
            f"no layout of {request.gpus} GPUs is possible with what is asked for; "
            f"plain data parallelism {'is not: ' + one if one else 'is'}."
        )
    plans = [evaluate(request, layout) for layout in watch(layouts)]
    fitting = sorted((plan for plan in plans if plan.fits), key=lambda plan: (plan.seconds, plan.memory.device))
    if not fitting:
        smallest = sorted(plans, key=lambda plan: plan.memory.device)[:best]
        return [replace(plan, reason="does not fit") for plan in smallest]
    chosen = _distinct(fitting, best)
    return [replace(plan, reason=reason(plan, chosen[0], request, plans)) for plan in chosen]


def _distinct(plans: list[Plan], best: int) -> list[Plan]:
    """Returns the first plans, one of those that only differ in what does not change their time."""
    found: dict[str, Plan] = {}
    for plan in plans:
        found.setdefault(f"{plan.seconds:.4f}", plan)
        if len(found) == best:
            break
    return list(found.values())


def reason(plan: Plan, winner: Plan, request: Request, all_plans: list[Plan]) -> str:
    """Returns why a plan is slower than the winner: the part that takes longest beyond the winner's."""
    if plan is winner:
        faster = [p for p in all_plans if not p.fits and p.seconds < plan.seconds]
        if not faster:
            return "the fastest of all"
        missing = min(faster, key=lambda p: p.seconds)
        need = missing.memory.device / GIB
        return f"the fastest that fits ({missing.layout} would need {need:.0f} of {request.cluster.memory:.0f} GiB)"
    own, best = plan.duration.by_part(), winner.duration.by_part()
    part = max(own, key=lambda name: own[name] - best[name])
    return f"{REASONS[part]} (+{100 * (own[part] - best[part]) / winner.seconds:.1f} % of the best step)"
