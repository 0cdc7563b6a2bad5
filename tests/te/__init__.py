# SPDX-License-Identifier: Apache-2.0
"""What can be proven of Transformer Engine without a GPU: that everything is built, and as checkpoints want it.

Run by `make test-te`, with an environment of its own. The process claims eight GPUs and has the CPU's memory, so that
modules, optimizers and contexts are constructed as on CUDA; no kernel of Transformer Engine runs in any of it.
"""
