# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do at most, from their makers' data sheets."""

from __future__ import annotations

# Part of the device's name -> TFLOP/s in bf16 without sparsity; the first that matches decides.
PEAKS: dict[str, float] = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "H20": 148.0,
    "H800": 989.4,
    "GB200": 2500.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "A100": 311.9,
    "A800": 311.9,
    "L40S": 362.0,
}


def peak_tflops(device: str) -> float | None:
    """Returns a GPU's peak in TFLOP/s in bf16, which MFU refers to whatever is computed in FP8; None if not known.

    Args:
        device: Name of the device, from `torch.cuda.get_device_name()`.
    """
    return next((peak for name, peak in PEAKS.items() if name in device), None)
