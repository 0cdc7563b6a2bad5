# SPDX-License-Identifier: Apache-2.0
"""What a placement of E experts on n devices costs by chance, and at the least, for tokens that choose K experts.

A token's home is the rank that holds it when it is dispatched: the one that read its sample. What leaves a device:

- Megatron's all-to-all sends one copy of a token to each of its K experts; a copy stays if the expert is at home.
- A DeepEP-like dispatch sends one copy to each device that has any of the K experts.

Homes are independent of the experts chosen: samples are dealt to ranks before anything is routed. So each copy, and
each device that a token reaches, is away from home with probability (n - 1) / n, and

    copies that leave, all-to-all   K (n - 1) / n         whatever the placement,
    copies that leave, per device   D (n - 1) / n         with D the mean number of devices per token.

A device holds E / n experts, so K of them are on at least ceil(K n / E) devices: D has this floor, and crossing, D > 1,
can be avoided altogether only where K <= E / n.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class Sizes:
    """Sizes of an MoE layer and its placement.

    Attributes:
        num_experts: E, the number of experts.
        top_k: K, experts per token.
        devices: n, the number of devices, which divides E.
    """

    num_experts: int
    top_k: int
    devices: int

    @property
    def away(self) -> float:
        """The share of independent copies that leave their home, (n - 1) / n."""
        return (self.devices - 1) / self.devices

    @property
    def chance_crossing(self) -> float:
        """Probability that K different experts, drawn evenly, lie on more than one device.

        1 - n C(E/n, K) / C(E, K): 99.5 % for 8 of 64 on two devices, 57 % for 2 of 8.
        """
        local = self.num_experts // self.devices
        return 1 - self.devices * comb(local, self.top_k) / comb(self.num_experts, self.top_k)

    @property
    def chance_devices(self) -> float:
        """Mean number of devices that K different experts, drawn evenly, lie on: n (1 - C(E - E/n, K) / C(E, K))."""
        others = self.num_experts - self.num_experts // self.devices
        return self.devices * (1 - comb(others, self.top_k) / comb(self.num_experts, self.top_k))

    @property
    def least_devices(self) -> int:
        """The smallest number of devices that hold K experts, ceil(K n / E)."""
        return -(-self.top_k * self.devices // self.num_experts)

    @property
    def least_crossing(self) -> float:
        """The smallest share of crossing tokens: 0 where one device can hold K experts, otherwise 1."""
        return float(self.least_devices > 1)

    def cut(self, before: float, after: float) -> float | None:
        """Returns the share of the reachable cut in D, and so in bytes per device, that is reached; None if none is."""
        reachable = before - self.least_devices
        return (before - after) / reachable if reachable > 1e-12 else None
