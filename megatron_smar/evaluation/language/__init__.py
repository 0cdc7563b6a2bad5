# SPDX-License-Identifier: Apache-2.0
"""Language benchmarks through EleutherAI's lm-evaluation-harness."""
