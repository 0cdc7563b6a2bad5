# SPDX-License-Identifier: Apache-2.0
"""The programs that a user runs; `tools/` starts the same ones from a checkout."""
