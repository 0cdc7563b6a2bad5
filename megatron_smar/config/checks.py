# SPDX-License-Identifier: Apache-2.0
"""Refuses flags with which no run can train, before Megatron starts anything.

The error message is one sentence, the same on every rank.
"""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_smar import runtime
from megatron_smar.config.build import data_config, image_config, modality_routing_config, vision_config
from megatron_smar.model.parts import LANGUAGE_PARTS, frozen_parts
from megatron_smar.model.vision import load_vision_config
from megatron_smar.monitoring.config import MonitorConfig
from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.strategies import STRATEGIES


def check_shape(args: Namespace, is_known: bool = True) -> None:
    """Refuses models and parallel layouts that cannot train.

    Args:
        args: The parsed flags.
        is_known: Whether the model's shape is known; with --use-checkpoint-args it is not until the checkpoint is read.

    Raises:
        ValueError: A flag cannot be used; the message gives the flag, its value and the fix.
    """
    _check_freeze(args, is_known)
    _check_routing(args, modality_routing_config(args), is_known)
    _check_layers(args)
    _check_skipped(args, is_known)
    _check_loss(args)
    _check_parallelism(args)


def check_arguments(args: Namespace, needs_data: bool = True) -> None:
    """Refuses flags with which no run can train, with the same sentence on every rank.

    Args:
        args: The parsed flags, before Megatron validates its own.
        needs_data: Whether the program reads --data-path.

    Raises:
        ValueError: A flag cannot be used; the message gives the flag, its value and the fix.
    """
    runtime.check_flags(args)
    if args.vision_model is None:
        raise ValueError("--vision-model is missing; give the folder or the hub name of a Hugging Face vision encoder.")
    load_vision_config(vision_config(args))
    image_config(args)
    _check_vision_balance(args)
    if args.peak_tflops is not None and args.peak_tflops <= 0:
        raise ValueError(f"--peak-tflops is {args.peak_tflops}; give the device's peak in TFLOP/s, or leave it out.")
    if needs_data:
        if not args.data_path or len(args.data_path) != 1 or len(args.valid_data_path or []) > 1:
            raise ValueError(
                "--data-path (and --valid-data-path) takes one folder of shards made by tools/data/prepare.py, or one "
                f"energon metadataset, not {args.data_path or 'nothing'}."
            )
        data_config(args)
        if args.packing_buffer_size and args.eval_micro_batch_size not in (None, 1):
            raise ValueError(
                f"--eval-micro-batch-size {args.eval_micro_batch_size} with --packing-buffer-size: a micro-batch of "
                "validation is one pack too; leave it out."
            )
    _check_sizes(args)
    check_shape(args, is_known=not args.use_checkpoint_args)
    MonitorConfig.from_arguments(args)
    ReliabilityConfig.from_arguments(args)
    if args.dataloader_type != "external":
        raise ValueError(
            f"--dataloader-type is {args.dataloader_type}; conversations come through energon: leave the flag out."
        )
    _check_batch_sizes(args)
    _check_benchmarks(args)


def _check_benchmarks(args: Namespace) -> None:
    """Refuses flags under which the benchmarks of --eval-benchmarks cannot be asked; their files are read later."""
    if not args.eval_benchmarks:
        return
    given = f"--eval-benchmarks {' '.join(args.eval_benchmarks)}"
    if args.eval_benchmarks_data is None:
        raise ValueError(f"{given} needs --eval-benchmarks-data, the folder with a folder for each of them.")
    for flag in ("samples", "batch_size"):
        if (value := getattr(args, f"eval_benchmarks_{flag}")) < 1:
            raise ValueError(f"--eval-benchmarks-{flag.replace('_', '-')} is {value}; give 1 or more.")
    for name, is_given in {
        "--fp8-format": args.fp8,
        "--tp-comm-overlap": args.tp_comm_overlap,
        "--moe-expert-capacity-factor": args.moe_expert_capacity_factor,
    }.items():
        if is_given:
            raise ValueError(
                f"{given} are answered token by token, which {name} does not allow or changes: leave one of them out, "
                "and evaluate the checkpoints with tools/evaluate.py."
            )
    if not args.eval_iters or not args.eval_interval:
        raise ValueError(f"{given} are asked after each validation: give --eval-iters and --eval-interval.")
    if args.pipeline_model_parallel_size > 1 or args.context_parallel_size > 1:
        raise ValueError(
            f"{given} cannot be asked under --pipeline-model-parallel-size or --context-parallel-size: leave these "
            "out, or evaluate the checkpoints with tools/evaluate.py, under another layout."
        )
    if args.moe_token_dispatcher_type == "allgather" and args.num_experts:
        raise ValueError(
            f"{given} have prompts of different lengths on different ranks, which --moe-token-dispatcher-type "
            "allgather cannot dispatch: give alltoall."
        )
    if args.conversation_template == "plain":
        raise ValueError(
            f"{given} need questions, which --conversation-template plain leaves out: give the template of stage 2, or "
            "leave --eval-benchmarks out."
        )


def _check_freeze(args: Namespace, shape_is_known: bool) -> None:
    parts = {"vision", "connector", *LANGUAGE_PARTS}
    if shape_is_known:
        number = len(moe_layers(args)) if args.num_experts else 0
        parts -= {"experts", "router"} if not number else set()
        parts -= {"dense"} if number == args.num_layers else set()
    if parts <= frozen_parts(args.freeze):
        raise ValueError(
            f"--freeze {' '.join(args.freeze)} leaves nothing to train in this model; leave out at least one of them."
        )


def _check_vision_balance(args: Namespace) -> None:
    if not args.balance_vision:
        return
    if "vision" not in args.freeze:
        raise ValueError(
            "--balance-vision is for a frozen vision encoder: the gradient of a trained one would be computed by other "
            "replicas than those that hold its samples; give --freeze vision, or leave --balance-vision out."
        )
    if not args.use_gloo_process_groups:
        raise ValueError(
            "--balance-vision exchanges numbers of tiles over Gloo; leave out --disable-gloo-process-groups."
        )


def _check_allowed(args: Namespace, routing: ModalityRoutingConfig) -> None:
    """Refuses allowed experts that leave a token fewer than K experts, and flags with which they cannot be applied."""
    for layer in moe_layers(args):
        allowed = routing.allowed(layer, args.num_experts)
        if allowed is None:
            continue
        modality, own = min(enumerate(allowed.sum(dim=1).tolist()), key=lambda of: of[1])
        if own < args.moe_router_topk:
            raise ValueError(
                f"--modality-routing {routing.strategy.name} leaves {routing.modalities.names[modality]} tokens {own} "
                f"experts in layer {layer}, but --moe-router-topk is {args.moe_router_topk}; give each modality at "
                "least as many."
            )
        if args.moe_router_group_topk:
            raise ValueError(
                f"--moe-router-group-topk {args.moe_router_group_topk} can choose groups in which --modality-routing "
                f"{routing.strategy.name} leaves a token too few experts; leave it and --moe-router-num-groups out."
            )
        if args.moe_router_fusion and args.moe_router_enable_expert_bias:
            raise ValueError(
                f"--moe-router-fusion adds one --moe-router-enable-expert-bias to all tokens, and --modality-routing "
                f"{routing.strategy.name} needs one by modality; leave --moe-router-fusion out."
            )


def _check_choice(args: Namespace, strategy: str) -> None:
    """Refuses flags under which Megatron would choose experts without the strategy's bias."""
    for flag, given in (
        ("--moe-router-fusion", args.moe_router_fusion),
        ("--moe-enable-routing-replay", args.moe_enable_routing_replay),
        ("--moe-router-load-balancing-type sinkhorn", "sinkhorn" in args.moe_router_load_balancing_type),
    ):
        if given:
            raise ValueError(
                f"{flag} would choose experts without the bias of --modality-routing {strategy}; leave it out."
            )


def _check_routing(args: Namespace, routing: ModalityRoutingConfig, shape_is_known: bool) -> None:
    strategy = routing.strategy
    if strategy.needs_experts and not args.num_experts and shape_is_known:
        raise ValueError(
            f"--modality-routing {strategy.name} works on the routers of MoE layers, and this model has none; "
            "give --num-experts, or --modality-routing none."
        )
    for other in STRATEGIES.values():
        other.from_arguments(args)  # a wrong value is refused even if this run would not read it
        if other is not type(strategy):
            other.check_unused(args)
    strategy.check(args, moe_layers(args) if shape_is_known else None)
    if strategy.keeps_state and args.smar_scope == "local":
        raise ValueError(
            f"--smar-scope local with --modality-routing {strategy.name}: the replicas would accumulate different "
            "statistics over the steps; leave --smar-scope out."
        )
    if strategy.biases_choice:
        _check_choice(args, strategy.name)
    if args.num_experts and shape_is_known:
        _check_allowed(args, routing)
    learns_biases = routing.trains_bias
    saves_optimizer = args.save and not args.no_save_optim
    if learns_biases and saves_optimizer and (args.bf16 or args.fp16) and not args.use_distributed_optimizer:
        raise ValueError(
            "--bf16 and --fp16 leave the modality biases in float32, and Megatron saves the state of such an optimizer "
            "only with --use-distributed-optimizer: give it, or --no-save-optim, or --no-modality-router-bias."
        )
    if learns_biases and args.optimizer_cpu_offload:
        raise ValueError(
            "--optimizer-cpu-offload cannot load the modality biases, which are float32, from a checkpoint: leave it "
            "out, or give --no-modality-router-bias."
        )
    if args.moe_pad_expert_input_to_capacity:
        raise ValueError(
            "--moe-pad-expert-input-to-capacity fills every expert, so that no statistics of the routing are left; "
            "leave it out."
        )
    if args.moe_router_load_balancing_type in (["quantile_balancing"], "quantile_balancing"):
        raise ValueError(
            "--moe-router-load-balancing-type quantile_balancing cannot leave padding out; use aux_loss or none."
        )


def _check_layers(args: Namespace) -> None:
    if args.gelu_tanh and (args.swiglu or args.squared_relu or args.quick_geglu):
        raise ValueError(
            "--gelu-tanh is one activation, --swiglu, --squared-relu and --quick-geglu are others; give one."
        )
    if args.num_experts and args.moe_grouped_gemm and args.add_bias_linear and args.bias_dropout_fusion:
        raise ValueError(
            "--moe-grouped-gemm with biases in the linear layers needs --no-bias-dropout-fusion: add it, or give "
            "--disable-bias-linear for a model without biases."
        )
    if args.parallel_block and args.multi_latent_attention:
        raise ValueError("--parallel-block has no multi-latent attention; leave out one of the two flags.")
    if args.multi_latent_attention and args.rope_type == "rope" and args.apply_rope_fusion:
        raise ValueError(
            "--rope-type rope with --multi-latent-attention has no fused kernel (Megatron's supports only YaRN); give "
            "--no-rope-fusion."
        )
    if args.qk_l2_norm:
        raise ValueError("--qk-l2-norm is implemented in none of the layers here and has no effect; leave it out.")
    if args.multi_latent_attention and args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} with --multi-latent-attention needs "
            "--sequence-parallel: without it gradients would be counted twice or in part; add --sequence-parallel."
        )
    if args.qk_norm_scope == "projection" and (not args.qk_layernorm or args.normalization != "RMSNorm"):
        raise ValueError("--qk-norm-scope projection needs --qk-layernorm and --normalization RMSNorm; give both.")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.qk_norm_scope == "projection" and groups and groups % args.tensor_model_parallel_size:
        raise ValueError(
            f"--qk-norm-scope projection needs --tensor-model-parallel-size to divide the {groups} heads of keys, and "
            f"it is {args.tensor_model_parallel_size}; make it smaller."
        )
    if args.latent_norm_epsilon is not None and not (args.multi_latent_attention and args.qk_layernorm):
        raise ValueError(
            "--latent-norm-epsilon belongs to the norms in multi-latent attention; give --multi-latent-attention and "
            "--qk-layernorm, or leave it out."
        )


def _check_skipped(args: Namespace, shape_is_known: bool) -> None:
    """Refuses --skip-unused-experts where the last layer's experts need all tokens, or there are none."""
    if not args.skip_unused_experts:
        return
    if shape_is_known and (not args.num_experts or args.num_layers not in moe_layers(args)):
        raise ValueError("--skip-unused-experts: the last layer has no experts in this model; leave it out.")
    if args.moe_token_dispatcher_type != "alltoall":
        raise ValueError(
            f"--skip-unused-experts leaves the ranks different numbers of tokens, which --moe-token-dispatcher-type "
            f"{args.moe_token_dispatcher_type} does not dispatch here; give alltoall, or leave it out."
        )
    shards = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if shards > 1:
        raise ValueError(
            "--skip-unused-experts leaves the ranks different numbers of tokens, which expert tensor parallelism does "
            f"not gather here; give --expert-tensor-parallel-size 1 instead of {shards}, or leave it out."
        )
    if args.moe_expert_capacity_factor is not None:
        raise ValueError(
            f"--skip-unused-experts with --moe-expert-capacity-factor {args.moe_expert_capacity_factor}: an expert's "
            "slots are counted for all tokens; leave out one of the two."
        )
    if args.moe_router_padding_for_quantization:
        raise ValueError(
            "--skip-unused-experts with --moe-router-padding-for-quantization can leave fewer tokens than an expert is "
            "padded to; leave out one of the two."
        )


def _check_loss(args: Namespace) -> None:
    if args.loss_weighting is not None and args.calculate_per_token_loss:
        raise ValueError(
            f"--loss-weighting {args.loss_weighting} and --calculate-per-token-loss are two means of the same loss "
            "(--loss-weighting token is the mean over all tokens); leave out one of the two."
        )
    if args.mtp_num_layers:
        raise ValueError(
            f"--mtp-num-layers {args.mtp_num_layers} adds a loss of multi-token prediction layers, which are not built "
            "here; leave it out."
        )


def moe_layers(args: Namespace | TransformerConfig) -> list[int]:
    """Returns the numbers, from 1, of the MoE layers (--moe-layer-freq)."""
    frequency, layers = args.moe_layer_freq, range(1, (args.num_layers or 0) + 1)
    if isinstance(frequency, int):
        return [layer for layer in layers if (layer - 1) % frequency == 0]
    return [layer for layer, is_moe in zip(layers, frequency, strict=False) if is_moe]


def _check_sizes(args: Namespace) -> None:
    for name in ("tensor_model", "pipeline_model", "context", "expert_model"):
        size = getattr(args, f"{name}_parallel_size")
        if size < 1:
            raise ValueError(f"--{name.replace('_', '-')}-parallel-size is {size}; give 1 or more.")
    for name in ("micro_batch_size", "global_batch_size", "eval_micro_batch_size", "eval_global_batch_size"):
        size = getattr(args, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {size}; give 1 or more.")


def _check_heads(args: Namespace) -> None:
    size, groups = args.tensor_model_parallel_size, args.num_query_groups if args.group_query_attention else None
    for flag, heads in (("--num-attention-heads", args.num_attention_heads), ("--num-query-groups", groups)):
        if heads and heads % size and (flag == "--num-attention-heads" or heads > size or size % heads):
            raise ValueError(
                f"{flag} {heads} cannot be divided among --tensor-model-parallel-size {size}; give a size that divides "
                f"{heads}."
            )


def _check_batch_sizes(args: Namespace) -> None:
    """Checks the number of ranks and the batch sizes.

    Megatron checks them too, but its messages name no flags or come after the process groups are created.
    """
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    if args.world_size % model:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size} x --context-parallel-size {args.context_parallel_size} needs a "
            f"multiple of {model} ranks, and there are {args.world_size}; change the flags, or torchrun's "
            "--nproc-per-node."
        )
    replicas = args.world_size // model
    for micro_flag, total_flag, micro, total in (
        ("--micro-batch-size", "--global-batch-size", args.micro_batch_size, args.global_batch_size),
        (
            "--eval-micro-batch-size" if args.eval_micro_batch_size else "--micro-batch-size",
            "--eval-global-batch-size" if args.eval_global_batch_size else "--global-batch-size",
            args.eval_micro_batch_size or args.micro_batch_size,
            args.eval_global_batch_size or args.global_batch_size,
        ),
    ):
        if micro and total and total % (micro * replicas):
            raise ValueError(
                f"{total_flag} {total} is not a multiple of {micro_flag} {micro} x {replicas} data-parallel replicas "
                f"({args.world_size} ranks / {model}); give a multiple of {micro * replicas}."
            )


def _check_dispatcher(args: Namespace) -> None:
    backend = {"deepep": "deep_ep", "hybridep": "deep_ep"}.get(args.moe_flex_dispatcher_backend)
    if args.num_experts and args.moe_token_dispatcher_type == "flex" and backend and not find_spec(backend):
        raise ValueError(
            f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {args.moe_flex_dispatcher_backend} "
            "needs the package deep_ep (DeepEP), which is not installed; install it, or give alltoall."
        )
    if args.moe_expert_rank_capacity_factor is not None:
        raise ValueError(
            f"--moe-expert-rank-capacity-factor {args.moe_expert_rank_capacity_factor} drops tokens in the dispatcher, "
            "after the routing statistics have counted them; leave it out, or give --moe-expert-capacity-factor."
        )
    if args.moe_enable_routing_replay:
        raise ValueError(
            "--moe-enable-routing-replay is for programs that record the chosen experts and give them back, and "
            "training and evaluation here do neither; leave it out."
        )


def _check_parallelism(args: Namespace) -> None:
    _check_heads(args)
    _check_dispatcher(args)
    if args.hybrid_context_parallel:
        raise ValueError("--hybrid-context-parallel shards batches in a way that is not supported here; leave it out.")
    if args.iterations_to_skip:
        raise ValueError(
            "--iterations-to-skip reads the data on one tensor-parallel rank only, where each reads its own; "
            "leave it out."
        )
    if args.tensor_model_parallel_size > 1 and args.num_experts and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} with MoE layers needs "
            "--sequence-parallel: without it every tensor-parallel rank would count the same tokens again; "
            "add --sequence-parallel."
        )
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        raise ValueError(
            "--overlap-moe-expert-parallel-comm interleaves the layers of two micro-batches, which the routing "
            "statistics do not support yet; leave it out."
        )
    kernels = {"layernorm", "moe_act", "mla_up_proj"} & set(args.recompute_modules or [])
    if kernels and args.transformer_impl == "local":
        raise ValueError(
            f"--recompute-modules {' '.join(sorted(kernels))} needs Transformer Engine; use --transformer-impl "
            "transformer_engine, or recompute core_attn or moe."
        )
    if args.cuda_graph_impl not in (None, "none"):
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} is not supported with modality-aware routing; leave it out."
        )
    if args.optimizer_cuda_graph:
        raise ValueError(
            "--optimizer-cuda-graph replays the optimizer's step without checking the gradients, so that a step that "
            "is not finite would be applied; leave it out."
        )
    if args.use_megatron_fsdp:
        raise ValueError(
            "--use-megatron-fsdp is not supported: its optimizer would apply a step that is not finite; use "
            "--use-distributed-optimizer."
        )
