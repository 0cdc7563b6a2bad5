# SPDX-License-Identifier: Apache-2.0
"""A run's flags, the configs built from them, and the checks that involve more than one config."""
