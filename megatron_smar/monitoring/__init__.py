# SPDX-License-Identifier: Apache-2.0
"""Monitoring of the routing during a run, on the console, in TensorBoard and in W&B."""
