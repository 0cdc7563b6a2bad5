# SPDX-License-Identifier: Apache-2.0
"""Build script for the sequence packer in C++. All other settings are in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError


class BuildPacker(build_ext):
    """Ends with one sentence on what is missing if the packer cannot be built, after the compiler's own output."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"megatron_smar's sequence packer could not be built ({error}): it needs a C++17 compiler and "
                "Python's headers; install them (on Debian or Ubuntu: apt-get install g++ python3-dev), or name your "
                "compiler in CC and CXX, and install again."
            ) from error


setup(
    ext_modules=[Pybind11Extension("megatron_smar.data._packing", ["megatron_smar/data/csrc/packing.cpp"], cxx_std=17)],
    cmdclass={"build_ext": BuildPacker},
)
