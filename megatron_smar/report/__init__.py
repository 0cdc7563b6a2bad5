# SPDX-License-Identifier: Apache-2.0
"""What a run has done: its logged scalars, figures of its routing, and a report to read and to keep."""

from megatron_smar.report.report import print_table, write_report
from megatron_smar.report.scalars import Series, read_scalars

__all__ = ["Series", "print_table", "read_scalars", "write_report"]
