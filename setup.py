# SPDX-License-Identifier: Apache-2.0
"""Build script; everything declarative stands in pyproject.toml."""

from setuptools import setup

setup()
