# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests in a process that claims a GPU, and for the programs that it starts without one."""

import os
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

if util.find_spec("transformer_engine") is None:
    raise pytest.UsageError(
        "tests/te needs Transformer Engine, which this environment does not have: run `make test-te`."
    )

from tests.redirected_cuda import claim_cuda, stand_for_the_device_in_megatron

claim_cuda()

from megatron_smar import runtime
from megatron_smar.runtime.environment import DEVICE_VARIABLE

runtime.install()
os.environ[DEVICE_VARIABLE] = "cpu"  # programs that the tests start
stand_for_the_device_in_megatron()

from tests.functional.conftest import world  # noqa: F401
from tests.launch import ROOT
from tests.models import save_tower
from tests.te.building import Layout, rank_of


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Initializes a parallel layout of one rank."""
    with rank_of(Layout()):
        yield


@pytest.fixture(scope="session")
def tower(tmp_path_factory) -> str:
    """Folder of a vision tower, which every model needs."""
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="session")
def python_without_te() -> Path:
    """Interpreter of an environment without Transformer Engine: that of `make env`."""
    python = Path(os.environ.get("PYTHON_WITHOUT_TE", ROOT / ".venv" / "bin" / "python"))
    assert python.is_file(), f"{python} is missing: run `make test-te`, or name another one by PYTHON_WITHOUT_TE=."
    return python
