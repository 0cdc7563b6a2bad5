# SPDX-License-Identifier: Apache-2.0
"""What several tests need."""

import os
import resource
import socket

import pytest
from hypothesis import settings

settings.register_profile("no timing", deadline=None)  # the machine's load is no property of the code
settings.load_profile("no timing")
os.environ.setdefault("MEGATRON_SMAR_DEVICE", "cpu")  # a machine's GPUs are tested by `make test-gpu`
if os.environ["MEGATRON_SMAR_DEVICE"] == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hidden before any test has torch count them
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks and data workers share the cores
INTERPRETERS = "MEGATRON_SMAR_TESTS_INTERPRETERS"  # if set, `tests.launch` forks no program
# energon leaves each loader's index files open until its process ends, and the data tests open a hundred loaders.
_, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="also run what is marked `matrix`: every parallel layout")


def pytest_configure(config: pytest.Config) -> None:
    """With --matrix, every program is started in a new interpreter."""
    if config.getoption("--matrix"):
        os.environ[INTERPRETERS] = "new"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --matrix, leave its tests out; a mark expression (-m) stays free for the user."""
    if not config.getoption("--matrix"):
        left_out = [item for item in items if item.get_closest_marker("matrix")]
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=left_out)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def single_rank():
    """Megatron's parallel state with one rank, on this machine's device."""
    from megatron_smar import runtime

    runtime.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo" if runtime.device() == "cpu" else "nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
