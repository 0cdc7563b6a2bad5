# SPDX-License-Identifier: Apache-2.0
"""The first tests on an NVIDIA GPU, in one command: `make test-gpu`, or `python -m tests.gpu --help`."""
