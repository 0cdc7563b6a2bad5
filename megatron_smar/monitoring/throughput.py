# SPDX-License-Identifier: Apache-2.0
"""What training computes per second: tokens, samples, tiles, floating-point operations, from what its steps really had.

Megatron's own figure takes every sequence as --seq-length tokens of text. Here tokens and tiles are counted in each
micro-batch, padding left out, and experts' tokens are those that were routed to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_smar.data.batch import VisionLanguageBatch
from megatron_smar.planning.operations import Operations, Recomputation, Work, operations
from megatron_smar.planning.shape import ModelShape

TAG = "throughput"
TERA = 1e12


@dataclass(frozen=True)
class ThroughputConfig:
    """What the throughput of a run is computed from.

    Attributes:
        shape: The model's shape.
        recomputation: What the backward pass computes again.
        capacity_limited: Whether padding takes no expert's slots (--moe-expert-capacity-factor).
        peak_tflops: Peak of a device in TFLOP/s, for MFU; None if not known.
        replicas: Number of data-parallel replicas.
    """

    shape: ModelShape
    recomputation: Recomputation = field(default_factory=Recomputation)
    capacity_limited: bool = False
    peak_tflops: float | None = None
    replicas: int = 1


class ThroughputMeter:
    """Counts the work of this rank's micro-batches, and says how much the run computes per second.

    Args:
        config: The run's throughput config.
        placeholders: Token ids of the placeholders of vision tokens.
        counts: Whether this rank counts for its replica, whose ranks all read the same samples.
    """

    def __init__(self, config: ThroughputConfig, placeholders: Sequence[int], counts: bool) -> None:
        self.config, self.counts = config, counts
        self._placeholders = torch.tensor(placeholders)
        self._needed = self._executed = Work()  # since the last interval
        self._step = self._last_step = Work()  # since `step_operations`

    def count(self, batch: VisionLanguageBatch) -> None:
        """Adds a micro-batch of this rank, on the host."""
        # Only the first pipeline stage has decoded tiles, so vision tokens are counted.
        vision_tokens = int(torch.isin(batch.input_ids, self._placeholders).logical_and(~batch.padding_mask).sum())
        tiles = vision_tokens / self.config.shape.vision.tokens
        needed, executed = work_of(batch, tiles)
        self._needed, self._executed = self._needed + needed, self._executed + executed
        self._step = self._step + needed

    def step_operations(self) -> float:
        """Returns the model operations of the last step: this replica's, times the number of replicas.

        Megatron asks for them in each step, when the replicas' numbers are not known to each other.
        """
        if self._step.tokens:
            self._last_step, self._step = self._step, Work()
        return self.config.replicas * operations(self.config.shape, self._all_routed(self._last_step)).total

    def _all_routed(self, work: Work) -> Work:
        """Returns work with the copies that experts compute where no token is dropped."""
        decoder = self.config.shape.decoder
        routed = work.tokens * decoder.top_k * sum(decoder.moe_layers)
        return replace(work, routed=routed - decoder.skipped(work.tokens, work.predicted))

    def report(self, seconds: float, routed: float, ends: bool) -> dict[str, float]:
        """Returns the scalars of the interval, by tag; called on all ranks.

        Args:
            seconds: How long the interval's steps took.
            routed: Copies of tokens that were routed to experts, over all layers and ranks.
            ends: Whether the next interval begins.
        """
        needed, executed = self._totals()
        if ends:
            self._needed = self._executed = Work()
        skipped = self.config.shape.decoder.skipped(needed.tokens, needed.predicted)
        needed = replace(needed, routed=routed - skipped)
        limited = self.config.capacity_limited
        executed = replace(executed, routed=routed) if limited else self._all_routed(executed)
        return self._scalars(seconds, needed, executed)

    def _totals(self) -> tuple[Work, Work]:
        """Returns what all replicas have counted."""
        device = torch.cuda.current_device()
        own = [getattr(work, f.name) * self.counts for work in (self._needed, self._executed) for f in fields(Work)]
        sums = torch.tensor(own, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        needed, executed = sums.cpu().chunk(2)
        return Work(*needed.tolist()), Work(*executed.tolist())

    def _scalars(self, seconds: float, needed: Work, executed: Work) -> dict[str, float]:
        shape, world = self.config.shape, dist.get_world_size()
        model = operations(shape, needed)
        hardware = operations(shape, executed, recomputation=self.config.recomputation)
        scalars = {f"{what}_per_second": getattr(needed, what) / seconds for what in ("tokens", "samples", "tiles")}
        scalars |= _per_device("model", model, seconds * world) | _per_device("hardware", hardware, seconds * world)
        if self.config.peak_tflops is not None:
            for name, done in (("mfu", model), ("hfu", hardware)):
                scalars[name] = done.total / (seconds * world * TERA * self.config.peak_tflops)
        return {f"{TAG}/{name}": value for name, value in scalars.items()}


def _per_device(kind: str, done: Operations, seconds: float) -> dict[str, float]:
    parts = {"": done.total, "_decoder": done.decoder, "_encoder": done.encoder}
    return {f"{kind}_tflops{part}": value / seconds / TERA for part, value in parts.items()}


def console_part(scalars: Mapping[str, float]) -> str:
    """Returns the text of a console line, in Megatron's form."""
    shown = {
        "tokens/s": ("tokens_per_second", ".1f"),
        "samples/s": ("samples_per_second", ".2f"),
        "tiles/s": ("tiles_per_second", ".2f"),
        "model TFLOP/s/GPU": ("model_tflops", ".4g"),
        "MFU": ("mfu", ".3f"),
    }
    found = {name: (scalars.get(f"{TAG}/{tag}"), form) for name, (tag, form) in shown.items()}
    return "".join(f" {name}: {value:{form}} |" for name, (value, form) in found.items() if value is not None)


def work_of(batch: VisionLanguageBatch, tiles: float, whole_scores: bool = False) -> tuple[Work, Work]:
    """Returns what a micro-batch needs, and what is executed for it; without the copies that are routed.

    Args:
        batch: The micro-batch, on the host.
        tiles: Number of its tiles.
        whole_scores: Whether the kernel computes the whole square of attention scores; those that are used (torch's,
            Transformer Engine's) compute the causal half.
    """
    real = ~batch.padding_mask
    needed, padded = _lengths(batch, real)
    common = Work(samples=len(batch.__key__), tiles=tiles, predicted=float(batch.loss_mask.count_nonzero()))
    return (
        replace(common, tokens=float(real.sum()), pairs=_pairs(needed, False)),
        replace(common, tokens=float(real.numel()), pairs=_pairs(padded, whole_scores)),
    )


def _lengths(batch: VisionLanguageBatch, real: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the lengths of the sequences without and with padding."""
    if batch.lengths is None:
        return real.sum(1), torch.full((real.shape[0],), real.shape[1])
    ends, until = batch.lengths.cumsum(0), F.pad(real[0].cumsum(0), (1, 0))
    return until[ends] - until[ends - batch.lengths], batch.lengths


def _pairs(lengths: Tensor, whole: bool) -> float:
    n = lengths.double()
    return float((n * n if whole else n * (n + 1) / 2).sum())
