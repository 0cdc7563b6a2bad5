# SPDX-License-Identifier: Apache-2.0
"""The first hour on one NVIDIA GPU, in one command: `make test-gpu`, or `python -m tests.gpu --help`."""
