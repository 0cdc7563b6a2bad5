# SPDX-License-Identifier: Apache-2.0
"""Checks of a job's nodes before its ranks start.

The sbatch file starts `probe` on groups of nodes and asks `rounds` what to try next, until it chooses the nodes.
"""
