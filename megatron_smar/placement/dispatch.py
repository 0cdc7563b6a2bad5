# SPDX-License-Identifier: Apache-2.0
"""Counts what a model's MoE layers dispatch, for several assignments of experts to devices at once.

For each modality these are the experts' load, the devices that tokens reach, and the copies from device to device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_smar.routing.router import ModalityAwareRouter

Assignments = Mapping[str, Mapping[int, Sequence[int]]]


@dataclass(frozen=True)
class Traffic:
    """What was dispatched in one layer, for one assignment of experts to n devices; C classes of tokens.

    The classes are the modalities, then padding, which Megatron dispatches too.

    Attributes:
        reached: Tokens of each class by the number of devices that they reach, [C, n + 1].
        copies: Copies from a home to a device, one per expert (Megatron's all-to-all), [C, n, n].
        single: Copies from a home to a device, one per device (a DeepEP-like dispatch), [C, n, n].
    """

    reached: Tensor
    copies: Tensor
    single: Tensor

    @property
    def tokens(self) -> Tensor:
        """Tokens of each class, [C]."""
        return self.reached.sum(dim=-1)

    @property
    def crossing(self) -> Tensor:
        """Share of the tokens of each class whose experts lie on more than one device, [C]; NaN without tokens."""
        return self.reached[:, 2:].sum(dim=-1) / self.tokens

    @property
    def devices(self) -> Tensor:
        """Mean number of devices per token of each class, [C]; NaN without tokens."""
        return self.reached @ torch.arange(self.reached.shape[-1], dtype=self.reached.dtype) / self.tokens

    def merged(self, classes: Sequence[int]) -> Traffic:
        """Returns the same for several classes together, as one."""
        return Traffic(*(part[list(classes)].sum(dim=0, keepdim=True) for part in self._parts))

    def plus(self, other: Traffic) -> Traffic:
        """Returns the sum of two."""
        return Traffic(*(a + b for a, b in zip(self._parts, other._parts, strict=True)))

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.reached, self.copies, self.single


def leaving(copies: Tensor) -> Tensor:
    """Returns how many copies [C, n, n] leave their home, [C]."""
    return copies.sum(dim=(-2, -1)) - copies.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def traffic_of(routing_map: Tensor, classes: Tensor, homes: Tensor, device_of: Sequence[int]) -> Traffic:
    """Counts the dispatch of one layer and batch; the sums stay on the batch's device.

    Args:
        routing_map: The chosen experts of N tokens, [N, E] bool.
        classes: One-hot classes, [N, C]; a token without a class is not counted.
        homes: Each token's home, a device's number, [N].
        device_of: For each expert, its device.
    """
    places = torch.tensor(device_of, device=routing_map.device)
    number = int(places.max()) + 1
    # float64 counts exactly, and has matrix products on every device.
    per_device = routing_map.double() @ torch.nn.functional.one_hot(places, number).double()
    single = (per_device > 0).double()
    of_class = classes.double()
    reached = of_class.t() @ torch.nn.functional.one_hot(single.sum(dim=-1).long(), number + 1).double()
    of_home = (of_class.unsqueeze(-1) * torch.nn.functional.one_hot(homes, number).double().unsqueeze(1)).flatten(1)
    shape = (of_class.shape[1], number, number)
    return Traffic(reached, (of_home.t() @ per_device).view(shape), (of_home.t() @ single).view(shape))


class DispatchCounter:
    """Sums the dispatch of every MoE layer over many batches.

    A sample's home is the rank that its number gives, counting round and round: so homes do not depend on the samples'
    order by kind.

    Args:
        assignments: For each name, the device of each expert by layer.

    Attributes:
        rows: Numbers of the samples in the batch to come, one per row; -1 for a row that does not count.
        loads: Tokens of each class sent to each expert, [C, E], by layer.
        traffic: By assignment and layer.
    """

    def __init__(self, assignments: Assignments) -> None:
        self.assignments = assignments
        self.rows: list[int] = []
        self.loads: dict[int, Tensor] = {}
        self.traffic: dict[str, dict[int, Traffic]] = {name: {} for name in assignments}

    def count(self, layer: int, routing_map: Tensor, modality_mask: Tensor) -> None:
        """Adds one layer's choice of experts in one batch.

        Args:
            layer: The layer's number, from 1.
            routing_map: The chosen experts, [s * b, E] bool.
            modality_mask: One-hot modalities, [s, b, M] bool; all False for padding.
        """
        rows = torch.tensor(self.rows, device=routing_map.device)
        mask = torch.cat([modality_mask, ~modality_mask.any(dim=-1, keepdim=True)], dim=-1)
        classes = (mask & (rows >= 0).view(1, -1, 1)).flatten(0, 1)
        load = classes.double().t() @ routing_map.double()
        self.loads[layer] = self.loads[layer] + load if layer in self.loads else load
        for name, by_layer in self.assignments.items():
            devices = max(by_layer[layer]) + 1
            homes = (rows.clamp(min=0) % devices).expand(modality_mask.shape[0], -1).flatten()
            new, sums = traffic_of(routing_map, classes, homes, by_layer[layer]), self.traffic[name]
            sums[layer] = sums[layer].plus(new) if layer in sums else new

    def reduce(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Sums the counts over ranks that have different tokens, and moves them to the host."""
        tensors = [*self.loads.values()]
        tensors += [part for sums in self.traffic.values() for traffic in sums.values() for part in traffic._parts]
        for group in groups:
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)
        self.loads = {layer: load.cpu() for layer, load in sorted(self.loads.items())}
        self.traffic = {
            name: {layer: Traffic(*(part.cpu() for part in sums[layer]._parts)) for layer in sorted(sums)}
            for name, sums in self.traffic.items()
        }


@contextmanager
def counted(modules: Iterable[torch.nn.Module], counter: DispatchCounter) -> Iterator[None]:
    """Counts the dispatch of the given modules' routers while the context lasts, except of multi-token prediction."""

    def count(
        router: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        mask = keywords["padding_mask"] if "padding_mask" in keywords else inputs[1]
        counter.count(router.layer_number, output[1].detach(), mask)

    found = (m for module in modules for m in module.modules() if isinstance(m, ModalityAwareRouter))
    routers = [router for router in found if not router.is_mtp_layer]
    handles = [router.register_forward_hook(count, with_kwargs=True) for router in routers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
