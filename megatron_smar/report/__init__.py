# SPDX-License-Identifier: Apache-2.0
"""The report of a run: its logged scalars, figures of its routing, and an HTML page."""
