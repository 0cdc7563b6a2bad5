# SPDX-License-Identifier: Apache-2.0
"""What is watched of the routing during a run, on the console, in TensorBoard and in W&B."""
