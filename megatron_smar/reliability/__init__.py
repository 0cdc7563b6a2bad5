# SPDX-License-Identifier: Apache-2.0
"""What a run does when something fails: trusted checkpoints, hangs, steps that are not finite."""
