# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: reading, writing and describing them, and checks that a checkpoint fits the model that loads it."""
