# SPDX-License-Identifier: Apache-2.0
"""How the environment affects Megatron's flags: different defaults, and flags that it does not support."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_smar.runtime.environment import Environment

# Minimum compute capability (major, minor) of the GPU by FP8 recipe (Transformer Engine's check_*_support functions).
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0), "custom": (8, 9)}
FP4_CAPABILITY = (10, 0)


def defaults_of(environment: Environment) -> dict[str, Any]:
    """Returns the defaults of Megatron's flags that differ in an environment; flags given by the user win."""
    if environment.device == "cpu":
        return {
            "distributed_backend": "gloo",
            "use_cpu_initialization": True,
            "transformer_impl": "local",
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_gelu_fusion": False,
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
            "async_tensor_model_parallel_allreduce": False,
        }
    # In bf16 the routing weights that SMAR measures would be rounded to 8 bits.
    defaults: dict[str, Any] = {"moe_router_dtype": "fp32"}
    if not environment.transformer_engine:
        defaults |= {"transformer_impl": "local", "apply_rope_fusion": False}
    if not environment.fused_weight_gradient:
        defaults |= {"gradient_accumulation_fusion": False}
    return defaults


def description(environment: Environment) -> str:
    """Returns the environment and its defaults in one line, which is logged when a run starts."""
    if environment.device == "cpu":
        return "CPU: Gloo, local layers, torch's AdamW"
    te = environment.transformer_engine
    layers = "" if te else "local layers, no RoPE fusion, --moe-grouped-gemm without effect, "
    optimizer = "FusedAdam" if environment.fused_adam else "torch's fused AdamW"
    fusion = "" if environment.fused_weight_gradient else ", no gradient accumulation fusion"
    return (
        f"CUDA, {'' if te else 'no '}Transformer Engine, {'' if environment.apex else 'no '}apex: "
        f"{layers or 'Transformer Engine layers, '}{optimizer}{fusion}, router in float32"
    )


def check_flags(args: Namespace, environment: Environment) -> None:
    """Refuses flags that the environment does not support, before anything is built.

    Args:
        args: Megatron's arguments, as its parser returns them.
        environment: The environment of this process.

    Raises:
        ValueError: A flag is not supported. The message is one sentence with the flag and the fix.
    """
    if args.fp8 and args.fp8_recipe not in FP8_CAPABILITY:  # Megatron's config accepts any string
        raise ValueError(f"--fp8-recipe is {args.fp8_recipe!r}; it must be one of {', '.join(FP8_CAPABILITY)}.")
    if environment.device == "cpu":
        _check_cpu(args)
    if not environment.transformer_engine:
        _check_without_transformer_engine(args, environment)
    elif args.fp8 or args.fp4:
        _check_card(args)
    if args.gradient_accumulation_fusion and not environment.fused_weight_gradient:
        raise ValueError(
            "--gradient-accumulation-fusion needs apex's fused_weight_gradient_mlp_cuda, which is "
            f"{'not used on the CPU' if environment.device == 'cpu' else 'not installed'}: build apex with its "
            "extensions, or give --no-gradient-accumulation-fusion."
        )


def _check_cpu(args: Namespace) -> None:
    if args.distributed_backend == "nccl":
        raise ValueError("--distributed-backend nccl needs GPUs, and this run is on the CPU; leave it out.")
    if args.moe_grouped_gemm:
        raise ValueError("--moe-grouped-gemm needs a GPU, and this run is on the CPU; leave it out.")
    shards = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if args.num_experts and args.expert_model_parallel_size > 1 and shards > 1:
        raise ValueError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size} with experts sharded over {shards} "
            "tensor-parallel ranks needs GPUs, because Gloo gathers no shares of unequal size: give "
            "--expert-tensor-parallel-size 1."
        )


def _check_without_transformer_engine(args: Namespace, environment: Environment) -> None:
    why, repair = "not installed", ", or install it (pip install --no-build-isolation '.[te]')"
    if environment.device == "cpu":
        why, repair = "not used on the CPU", ""
    needs = {
        f"--transformer-impl {args.transformer_impl}": args.transformer_impl != "local",
        "RoPE fusion": args.apply_rope_fusion,
        "--fp8-format": bool(args.fp8),
        "--fp4-format": bool(args.fp4),
        "--tp-comm-overlap": args.tp_comm_overlap,
        "--use-precision-aware-optimizer without --optimizer-cpu-offload": (
            args.use_precision_aware_optimizer and not args.optimizer_cpu_offload
        ),
    }
    instead = {
        f"--transformer-impl {args.transformer_impl}": "give --transformer-impl local, or leave it out",
        "RoPE fusion": "give --no-rope-fusion",
    }
    for flag, given in needs.items():
        if given:
            raise ValueError(
                f"{flag} needs Transformer Engine, which is {why}: {instead.get(flag, 'leave it out')}{repair}."
            )


def _check_card(args: Namespace) -> None:
    """Refuses an FP8 or FP4 format that the GPU does not support; Megatron would fail only in the first step."""
    import torch

    capability = torch.cuda.get_device_capability()
    flag, least = "--fp4-format", FP4_CAPABILITY
    if args.fp8:
        flag, least = f"--fp8-recipe {args.fp8_recipe}", FP8_CAPABILITY[args.fp8_recipe]
    if capability < least:
        able = [name for name, needed in FP8_CAPABILITY.items() if needed <= capability and name != "custom"]
        instead = f"give --fp8-recipe {' or '.join(able)}, or train in bf16" if able else "train in bf16"
        raise ValueError(
            f"{flag} needs a card of compute capability {least[0]}.{least[1]}, and {torch.cuda.get_device_name()} has "
            f"{capability[0]}.{capability[1]}: {instead}."
        )
