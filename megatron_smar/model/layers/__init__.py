# SPDX-License-Identifier: Apache-2.0
"""The decoder's layers: Megatron's specs with this project's modules in place of some of Megatron's."""
