# SPDX-License-Identifier: Apache-2.0
"""The connector between vision encoder and language model: two linear layers, replicated on every rank."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

ConnectorType = Literal["mlp2x_gelu", "internvl"]


class Connector(nn.Module):
    """Projects vision features into the language model's embedding space.

    `mlp2x_gelu`: Linear, GELU, Linear (LLaVA-1.5, VITA and the paper). `internvl`: a LayerNorm before these.

    Args:
        kind: Type of the connector.
        input_size: Size of the vision features.
        hidden_size: Hidden size of the language model.
        dtype: The dtype of the weights.
    """

    def __init__(self, kind: ConnectorType, input_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        if kind not in get_args(ConnectorType):
            raise ValueError(f"--connector is {kind!r}; it must be one of {', '.join(get_args(ConnectorType))}.")
        self.norm = nn.LayerNorm(input_size, dtype=dtype) if kind == "internvl" else nn.Identity()
        self.linear_1 = nn.Linear(input_size, hidden_size, dtype=dtype)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features [..., input_size] to [..., hidden_size]."""
        features = features.to(self.linear_1.weight.dtype)
        return self.linear_2(self.act(self.linear_1(self.norm(features))))
