# SPDX-License-Identifier: Apache-2.0
"""The picture benchmarks of the paper, one file each."""
