# SPDX-License-Identifier: Apache-2.0
"""Plans: the experts of each layer sorted by their share of text and cut into bins, one per device.

The bins are those of SMoES (arXiv 2604.23996), in which the experts of one bin live on one expert-parallel rank:

    f_spec(e) = C[text, e] / sum_m C[m, e]

with the load C[m, e], the tokens of modality m that were sent to expert e.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


def text_share(loads: Tensor) -> Tensor:
    """Returns f_spec, each expert's share of text, [E] in float64; 1/2 where nothing was routed.

    Args:
        loads: Tokens of each modality sent to each expert, [M, E], in any unit; text is row 0.
    """
    loads = loads.double()
    total = loads.sum(dim=0)
    return torch.where(total > 0, loads[0] / torch.where(total > 0, total, 1.0), 0.5)


def sorted_by_share(shares: Tensor) -> tuple[int, ...]:
    """Returns the experts in ascending order of their share of text, and of their numbers where shares are equal."""
    return tuple(torch.sort(shares, stable=True).indices.tolist())


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """Returns the order that undoes an order: where `order` puts expert e at place p, it puts expert p at place e."""
    places = [0] * len(order)
    for place, expert in enumerate(order):
        places[expert] = place
    return tuple(places)


def composed(first: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
    """Returns the order of applying `first`, and `then` to the numbers that `first` gave."""
    return tuple(first[expert] for expert in then)


def check_devices(devices: int, num_experts: int, flag: str = "--devices") -> None:
    """Checks that every device gets the same number of experts.

    Raises:
        ValueError: It does not.
    """
    if devices < 2 or num_experts % devices:
        fitting = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"{flag} is {devices}, but the model's {num_experts} experts are shared equally among the devices: give "
            f"one of {', '.join(map(str, fitting))}."
        )


@dataclass(frozen=True)
class Plan:
    """Which expert goes to which place, in each MoE layer; places are cut into one contiguous bin per device.

    Attributes:
        devices: Number of devices.
        orders: For each MoE layer, by its number from 1, the number of the expert that goes to place 0, 1, ...
        shares: f_spec of each expert of each layer, in the order of the experts' numbers.
        source: Where the loads come from, as a phrase.
        numbering: The first numbers of the experts, where the checkpoint that was planned for had been placed before.
    """

    devices: int
    orders: dict[int, tuple[int, ...]]
    shares: dict[int, tuple[float, ...]]
    source: str
    numbering: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def of_loads(cls, loads: dict[int, Tensor], devices: int, source: str, numbering: dict[int, list[int]]) -> Self:
        """Makes the plan for loads [M, E] by layer.

        Raises:
            ValueError: The experts cannot be shared equally.
        """
        shares = {layer: text_share(load) for layer, load in sorted(loads.items())}
        for share in shares.values():
            check_devices(devices, len(share))
        orders = {layer: sorted_by_share(share) for layer, share in shares.items()}
        return cls(devices, orders, {n: tuple(share.tolist()) for n, share in shares.items()}, source, numbering)

    @property
    def num_experts(self) -> int:
        """E, the number of experts of a layer."""
        return len(next(iter(self.orders.values())))

    def table(self) -> str:
        """Returns the bins as text: for each layer and device the experts, and their mean share of text."""
        size = self.num_experts // self.devices
        lines = [f"{self.num_experts} experts on {self.devices} devices, by {self.source}"]
        for layer, order in self.orders.items():
            for device in range(self.devices):
                own = order[device * size : (device + 1) * size]
                mean = sum(self.shares[layer][expert] for expert in own) / size
                lines.append(f"layer {layer:>3}  device {device:>2}  text {mean:6.1%}  {' '.join(map(str, own))}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes the plan as JSON."""
        layers = {
            str(layer): {"order": list(order), "text_share": list(self.shares[layer])}
            for layer, order in self.orders.items()
        }
        content = {"devices": self.devices, "source": self.source, "numbering": self.numbering, "layers": layers}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """Reads a plan.

    Raises:
        ValueError: The file cannot be read, or holds no plan.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        layers = {int(layer): values for layer, values in content["layers"].items()}
        plan = Plan(
            int(content["devices"]),
            {layer: tuple(map(int, values["order"])) for layer, values in layers.items()},
            {layer: tuple(map(float, values["text_share"])) for layer, values in layers.items()},
            str(content["source"]),
            {int(layer): list(numbers) for layer, numbers in content["numbering"].items()},
        )
        sizes = {len(order) for order in plan.orders.values()}
        is_whole = len(sizes) == 1 and all(sorted(o) == list(range(len(o))) for o in plan.orders.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--plan {path} holds no plan ({error}); give what `plan` wrote.") from error
    if not is_whole:
        raise ValueError(f"--plan {path} does not name each expert of each layer once; give what `plan` wrote.")
    check_devices(plan.devices, plan.num_experts, f"--plan {path}: devices")
    return plan
