# SPDX-License-Identifier: Apache-2.0
"""Tests that the distributed optimizer is built with Transformer Engine's FusedAdam and saves AdamW's state.

FusedAdam's step is a kernel, which never runs here: no weight is updated, and no saved state is loaded, since Megatron
makes a step with zero gradients before loading.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.te.programs import SETTINGS, shapes_in, trainer

SMAR = ["--modality-routing", "smar", "--smar-d-min", "3", "--smar-d-max", "4", "--smar-coeff", "0.1"]


def optimizers_of(chained: Any) -> list[Any]:
    """Returns the distributed optimizers inside Megatron's chained optimizer."""
    return list(getattr(chained, "chained_optimizers", [chained]))


def test_the_optimizer_covers_the_entire_model_and_has_state_for_every_parameter(world):
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    with trainer(*world.flags, *SMAR) as (model, chained, _):
        optimizers = optimizers_of(chained)
        assert len(optimizers) == 2, "expected one optimizer for the experts and one for all other parameters"
        for optimizer in optimizers:
            assert isinstance(optimizer, DistributedOptimizer) and isinstance(optimizer.optimizer, FusedAdam)
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        shards = [p for o in optimizers for group in o.optimizer.param_groups for p in group["params"]]
        states = [
            o.optimizer.state[p] for o in optimizers for group in o.optimizer.param_groups for p in group["params"]
        ]
        trained = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
        assert sum(p.numel() for p in shards) == sum(p.numel() for p in trained)
        for shard, state in zip(shards, states, strict=True):
            assert sorted(state) == ["exp_avg", "exp_avg_sq"]
            assert all(part.dtype == torch.float32 and part.shape == shard.shape for part in state.values())


OFFLOADED = ["--optimizer-cpu-offload", "--use-precision-aware-optimizer", "--overlap-cpu-optimizer-d2h-h2d"]
OFFLOADED += ["--no-modality-router-bias"]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_offloaded_optimizer_is_built_of_torchs_adamw_and_fused_adam(world, fraction):
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
    from transformer_engine.pytorch.optimizers import FusedAdam

    with trainer(*world.flags, *OFFLOADED, "--optimizer-offload-fraction", fraction) as (model, chained, _):
        hybrids = [optimizer.optimizer for optimizer in optimizers_of(chained)]
        assert len(hybrids) == 2 and all(isinstance(hybrid, HybridDeviceOptimizer) for hybrid in hybrids)
        on_host = [part for hybrid in hybrids for part in hybrid.cpu_optimizers]
        on_device = [hybrid.gpu_optimizer for hybrid in hybrids if hybrid.gpu_optimizer is not None]
        assert on_host and all(isinstance(part, torch.optim.AdamW) for part in on_host)
        assert all(isinstance(part, FusedAdam) for part in on_device) and bool(on_device) == (fraction < 1)
        held = sum(p.numel() for part in (*on_host, *on_device) for group in part.param_groups for p in group["params"])
        assert held == sum(p.numel() for chunk in model for p in chunk.parameters() if p.requires_grad)


def test_the_precision_aware_optimizer_keeps_main_parameters_in_its_own_state(world):
    """For bf16 parameters it keeps the missing 16 bits; modality biases are float32. A first step creates the state."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    found = set()
    with trainer(*world.flags, *SMAR, "--use-precision-aware-optimizer") as (_, chained, _):
        for optimizer in optimizers_of(chained):
            adam = optimizer.optimizer
            assert isinstance(adam, FusedAdam) and adam.master_weights and adam.store_param_remainders
            for parameter in (p for group in adam.param_groups for p in group["params"]):
                adam.initialize_state(parameter, parameter.dtype == torch.bfloat16)
                found.add((parameter.dtype, *((key, part.dtype) for key, part in adam.state[parameter].items())))
    moments = (("exp_avg", torch.float32), ("exp_avg_sq", torch.float32))
    assert found == {
        (torch.bfloat16, *moments, ("master_param", torch.int16)),
        (torch.float32, *moments, ("master_param", torch.float32)),
    }


def test_the_saved_state_has_the_keys_and_shapes_of_a_run_on_the_cpu(world, trained_on_cpu, tmp_path):
    from megatron.training.checkpointing import save_checkpoint

    with trainer(*world.flags, *SMAR, "--save", tmp_path) as (model, chained, scheduler):
        for optimizer in optimizers_of(chained):
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        save_checkpoint(2, model, chained, scheduler, 0)
    found, expected = shapes_in(tmp_path / "iter_0000002"), shapes_in(trained_on_cpu / "iter_0000002")
    assert any(key.startswith("optimizer") and "exp_avg_sq" in key for key in expected)
    assert found == expected


def test_the_cpu_trains_with_transformer_engine_installed(trained_on_cpu: Path):
    """The program of the fixture hides Transformer Engine from Megatron, and makes two steps."""
    assert (trained_on_cpu / "latest_checkpointed_iteration.txt").read_text() == "2"


@pytest.fixture(scope="module")
def trained_on_cpu(world, tmp_path_factory) -> Path:
    """The checkpoint of pretrain_vlm.py after two steps on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    output = world.train(*SMAR, *SETTINGS, "--num-workers", 0, "--save", folder, "--save-interval", 2).stdout
    assert "CPU: Gloo, local layers" in output and "iteration        2/       2" in output
    return folder
