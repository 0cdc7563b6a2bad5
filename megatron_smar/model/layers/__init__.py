# SPDX-License-Identifier: Apache-2.0
"""The decoder's layers: Megatron's specs with our parts in their places."""
