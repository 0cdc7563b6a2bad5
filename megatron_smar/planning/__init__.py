# SPDX-License-Identifier: Apache-2.0
"""What a model costs, from a plain description of its shape: operations, and what a run does of them per second."""
