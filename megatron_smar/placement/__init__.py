# SPDX-License-Identifier: Apache-2.0
"""Expert placement: which expert is on which expert-parallel rank, and what that costs in communication."""
