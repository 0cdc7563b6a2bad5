# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's format in and out of the trainer's: import, export, upcycling, and the tables per architecture."""
