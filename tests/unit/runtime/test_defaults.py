# SPDX-License-Identifier: Apache-2.0
"""Tests of the defaults of each environment, and of the flags that it refuses."""

from argparse import Namespace

import pytest

from megatron_smar.runtime.defaults import FP8_CAPABILITY, check_flags, defaults_of, description
from megatron_smar.runtime.environment import Environment

CPU = Environment("cpu")
TORCH_ONLY = Environment("cuda")
WITH_ENGINE = Environment("cuda", transformer_engine=True)
WITH_APEX = Environment("cuda", apex=True, fused_weight_gradient=True)
WITH_BOTH = Environment("cuda", transformer_engine=True, apex=True, fused_weight_gradient=True)


def flags(environment: Environment, **given: object) -> Namespace:
    """Returns what Megatron's parser returns: Megatron's defaults, then the environment's, then the user's flags."""
    megatron = {
        "transformer_impl": "transformer_engine",
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
        "distributed_backend": "nccl",
        "moe_grouped_gemm": False,
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp4": None,
        "tp_comm_overlap": False,
        "use_precision_aware_optimizer": False,
        "optimizer_cpu_offload": False,
        "num_experts": 4,
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
    }
    return Namespace(**(megatron | defaults_of(environment) | given))


@pytest.mark.parametrize("environment", [CPU, TORCH_ONLY, WITH_ENGINE, WITH_APEX, WITH_BOTH], ids=description)
def test_every_environment_accepts_its_own_defaults(environment):
    check_flags(flags(environment), environment)


@pytest.mark.parametrize(
    ("environment", "changed"),
    [
        (TORCH_ONLY, {"transformer_impl", "apply_rope_fusion", "gradient_accumulation_fusion", "moe_router_dtype"}),
        (WITH_ENGINE, {"gradient_accumulation_fusion", "moe_router_dtype"}),
        (WITH_APEX, {"transformer_impl", "apply_rope_fusion", "moe_router_dtype"}),
        (WITH_BOTH, {"moe_router_dtype"}),
    ],
    ids=["torch only", "Transformer Engine", "apex", "both"],
)
def test_only_missing_packages_change_a_default(environment, changed):
    assert set(defaults_of(environment)) == changed


@pytest.mark.parametrize("environment", [CPU, TORCH_ONLY, WITH_ENGINE, WITH_APEX, WITH_BOTH])
def test_the_start_line_names_device_layers_and_optimizer(environment):
    line = description(environment)
    assert "\n" not in line and ("AdamW" in line) != ("FusedAdam" in line)
    assert ("local layers" in line) == (not environment.transformer_engine)


@pytest.mark.parametrize(
    ("environment", "given", "said"),
    [
        (CPU, {"transformer_impl": "transformer_engine"}, "--transformer-impl transformer_engine needs"),
        (CPU, {"moe_grouped_gemm": True}, "--moe-grouped-gemm needs a GPU"),
        (CPU, {"distributed_backend": "nccl"}, "nccl needs GPUs"),
        (
            CPU,
            {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
            "--expert-model-parallel-size 2 with experts sharded over 2 tensor-parallel ranks needs GPUs",
        ),
        (CPU, {"fp8": "hybrid"}, "--fp8-format needs Transformer Engine, which is not used on the CPU"),
        (CPU, {"gradient_accumulation_fusion": True}, "not used on the CPU"),
        (TORCH_ONLY, {"transformer_impl": "transformer_engine"}, "give --transformer-impl local"),
        (TORCH_ONLY, {"apply_rope_fusion": True}, "give --no-rope-fusion"),
        (TORCH_ONLY, {"fp8": "hybrid"}, "--fp8-format needs Transformer Engine, which is not installed"),
        (TORCH_ONLY, {"tp_comm_overlap": True}, "--tp-comm-overlap needs"),
        (TORCH_ONLY, {"use_precision_aware_optimizer": True}, "without --optimizer-cpu-offload"),
        (WITH_ENGINE, {"gradient_accumulation_fusion": True}, "fused_weight_gradient_mlp_cuda"),
        (WITH_ENGINE, {"fp8": "hybrid", "fp8_recipe": "bogus"}, "it must be one of delayed, tensorwise"),
    ],
)
def test_a_flag_that_the_environment_does_not_support_is_refused_in_one_sentence(environment, given, said):
    with pytest.raises(ValueError) as refused:
        check_flags(flags(environment, **given), environment)
    message = str(refused.value)
    assert said in message and message.endswith(".") and "\n" not in message


def test_experts_of_one_tensor_parallel_rank_each_run_under_expert_parallelism_on_the_cpu():
    sizes = {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    check_flags(flags(CPU, **sizes), CPU)


def test_the_precision_aware_optimizer_with_cpu_offload_does_not_need_transformer_engine():
    given = {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    check_flags(flags(TORCH_ONLY, **given), TORCH_ONLY)


@pytest.mark.parametrize(
    ("capability", "recipe", "able"),
    [
        ((9, 0), "mxfp8", "delayed or tensorwise or blockwise"),
        ((8, 9), "blockwise", "delayed or tensorwise"),
        ((8, 0), "delayed", None),
    ],
)
def test_an_fp8_recipe_that_the_gpu_does_not_support_is_refused_at_the_start(monkeypatch, capability, recipe, able):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with pytest.raises(ValueError) as refused:
        check_flags(flags(WITH_ENGINE, fp8="hybrid", fp8_recipe=recipe), WITH_ENGINE)
    assert (f"give --fp8-recipe {able}, or" if able else "train in bf16") in str(refused.value)
    fits = [name for name, least in FP8_CAPABILITY.items() if least <= capability]
    for name in fits:
        check_flags(flags(WITH_ENGINE, fp8="hybrid", fp8_recipe=name), WITH_ENGINE)
