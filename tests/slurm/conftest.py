# SPDX-License-Identifier: Apache-2.0
"""A SLURM cluster of three virtual nodes for these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional.conftest import world
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import Jobs

__all__ = ["world"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Starts the cluster, or skips the tests with the reason why it cannot run here."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(nodes=3) as started:
        yield started


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    """Jobs of one test, whose files are in a folder of their own."""
    return Jobs(cluster, tmp_path)
