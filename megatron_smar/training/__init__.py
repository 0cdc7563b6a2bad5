# SPDX-License-Identifier: Apache-2.0
"""What Megatron's `pretrain()` is given: model and data providers, the forward step, and the routing metrics."""
