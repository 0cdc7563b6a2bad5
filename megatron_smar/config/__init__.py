# SPDX-License-Identifier: Apache-2.0
"""A run's flags, the configs that they become, and the checks that no config can make by itself."""
