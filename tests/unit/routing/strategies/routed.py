# SPDX-License-Identifier: Apache-2.0
"""One batch for the tests of strategies with losses, and a step of a router on it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

IDS = np.array([[0, 1], [0, 1], [1, 1], [0, 0], [1, -1], [-1, -1]])  # modalities [s, b]; -1 is padding


def batch(ids: np.ndarray = IDS, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns inputs [s, b, h], float64, and the modality mask [s, b, M] of two modalities."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*ids.shape, 48, generator=generator, dtype=torch.float64)
    return inputs, torch.from_numpy(ids).unsqueeze(-1) == torch.arange(2)


def set_weight(router: Any, seed: int = 2) -> None:
    """Gives a router random weights that spread the tokens over the experts."""
    generator = torch.Generator().manual_seed(seed)
    router.weight.data = 0.3 * torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)


def run(router: Any, inputs: Tensor, mask: Tensor) -> tuple[dict[str, float], Tensor]:
    """Runs one micro-batch; returns the losses by name, and their gradient with respect to the router's weight."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    reports: list[Any] = []
    router.recorders = [reports.append]
    output = router.finish(router(inputs, mask)[0])
    (gradient,) = torch.autograd.grad((output * 0).sum(), router.weight)
    return {name: float(loss) for name, loss in reports[0].losses.items()}, gradient


def logits_of(router: Any, inputs: Tensor, ids: np.ndarray, modality: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the inputs [n, h] of a modality's tokens and their logits [n, E], in NumPy."""
    rows = inputs.numpy()[ids == modality]
    return rows, rows @ router.weight.detach().numpy().T
