# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whether one fits the model that is to load it."""
