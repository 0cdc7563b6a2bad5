# SPDX-License-Identifier: Apache-2.0
"""Tests of Transformer Engine that need no GPU: everything can be built, in the form that checkpoints need.

Run by `make test-te` in a separate environment. The process claims eight GPUs and uses the CPU's memory, so that
modules, optimizers and contexts are constructed as on CUDA; no kernel of Transformer Engine runs.
"""
