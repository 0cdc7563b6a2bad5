# SPDX-License-Identifier: Apache-2.0
"""Clusters of GPUs: memory, speed and links, from data sheets, and how much of it training reaches."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_smar.planning.devices import peak_tflops

GIB = 1024**3


@dataclass(frozen=True)
class Cluster:
    """A kind of GPU and its links. Bandwidths are those of one GPU in one direction.

    Attributes:
        name: The GPU's name.
        memory: Memory of a GPU in GiB that a process can use.
        tflops: Peak in bf16 in TFLOP/s.
        memory_gbs: Bandwidth of its memory in GB/s.
        node_gbs: Bandwidth within a node in GB/s.
        network_gbs: Bandwidth between nodes in GB/s.
        latency: Time of a message in seconds.
        per_node: GPUs of a node.
        efficiency: Share of all these speeds that training reaches. The only value that is adjusted to measurements.
    """

    name: str
    memory: float
    tflops: float
    memory_gbs: float
    node_gbs: float
    network_gbs: float
    latency: float = 10e-6
    per_node: int = 8
    efficiency: float = 0.5

    def __post_init__(self) -> None:
        for name in ("memory", "tflops", "memory_gbs", "node_gbs", "network_gbs", "per_node", "efficiency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"the cluster's {name} is {getattr(self, name)}; it must be greater than 0.")
        if self.efficiency > 1:
            raise ValueError(f"the cluster's efficiency is {self.efficiency}; it is a share of the peak, at most 1.")


def _preset(name: str, memory: float, memory_gbs: float, node_gbs: float, network_gbs: float) -> Cluster:
    peak = peak_tflops(name)
    assert peak is not None
    return Cluster(name, memory, peak, memory_gbs, node_gbs, network_gbs)


# An eighth of a node's network per GPU: 400 Gb/s for H100 and H200, 400 Gb/s for B200 (DGX).
PRESETS: dict[str, Cluster] = {
    "h100": _preset("H100", 79.1, 3350, 450, 50),
    "h200": _preset("H200", 139.8, 4800, 450, 50),
    "b200": _preset("B200", 178.4, 8000, 900, 50),
}
