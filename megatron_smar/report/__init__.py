# SPDX-License-Identifier: Apache-2.0
"""What a run has done: its logged scalars, figures of its routing, and a page to read and to keep."""
