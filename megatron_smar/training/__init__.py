# SPDX-License-Identifier: Apache-2.0
"""What is passed to Megatron's `pretrain()`: model and data providers, the forward step, and the routing metrics."""
