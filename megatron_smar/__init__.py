# SPDX-License-Identifier: Apache-2.0
"""A Megatron-Core trainer for vision-language mixture-of-experts models with soft modality-aware routing (SMAR)."""

from megatron_smar.compatibility import check_environment

__version__ = "0.2.0"

# Here, because every program and test comes through here before it can import Megatron.
check_environment()
