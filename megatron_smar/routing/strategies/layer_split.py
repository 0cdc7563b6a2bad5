# SPDX-License-Identifier: Apache-2.0
"""Layer split: hard routing in the lower layers, all experts for all modalities above (VL-MoE, arXiv 2303.07226)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_smar.routing.strategies.hard import HardConfig


@dataclass(frozen=True)
class LayerSplitConfig(HardConfig):
    """Settings of layer split.

    Attributes:
        experts: The experts of each modality in the lower layers, in the form of --hard-experts. Default: equal shares.
        layers: Number of lower layers, counted from the first, whether or not they are MoE layers.
    """

    name = "layer_split"
    title = "hard in the lower layers, free above (VL-MoE)"
    of_a_run: ClassVar[tuple[str, ...]] = ("experts", "layers")
    of_inference: ClassVar[tuple[str, ...]] = ("experts", "layers")

    layers: int = 0

    def describe(self) -> str:
        """Returns the strategy and its settings, in half a line."""
        return f"{super().describe()}, in layers 1 to {self.layers}"

    def allowed(self, layer: int, modalities: Sequence[str], num_experts: int) -> Tensor | None:
        """Returns the experts of each modality in a lower layer, [M, E] bool; None in the layers above."""
        return super().allowed(layer, modalities, num_experts) if layer <= self.layers else None

    def check(self, args: Namespace, moe_layers: Sequence[int] | None) -> None:
        """Checks that there are MoE layers both among the lower layers and above them."""
        if moe_layers and not min(moe_layers) <= self.layers < max(moe_layers):
            raise ValueError(
                f"--layer-split-layers is {self.layers}, and the MoE layers are {list(moe_layers)}: give a number that "
                "leaves some of them below and some above, or --modality-routing hard or none."
            )
