# SPDX-License-Identifier: Apache-2.0
"""Conversion between Hugging Face's and the trainer's format: import, export, upcycling, tables per architecture."""
