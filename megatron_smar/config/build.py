# SPDX-License-Identifier: Apache-2.0
"""Builds the configs from a run's flags. Each is a dataclass next to the code it configures, and validates itself."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.checkpointing import checkpoint_exists

from megatron_smar.data.config import DataConfig
from megatron_smar.data.loss_weighting import LossWeighting
from megatron_smar.data.tiling import ImageConfig
from megatron_smar.modalities import Modalities
from megatron_smar.model.connector import ConnectorType
from megatron_smar.model.layers.specs import LayerConfig
from megatron_smar.model.vision import VisionConfig, tokens_per_tile
from megatron_smar.model.vlm import LanguageConfig
from megatron_smar.monitoring.config import MonitorConfig
from megatron_smar.reliability.config import ReliabilityConfig
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.strategies import STRATEGIES


def modality_table(args: Namespace) -> Modalities:
    """Returns the run's modalities; runs stored by a version without --image-modalities have text and vision."""
    return Modalities(tuple(getattr(args, "image_modalities", None) or Modalities().images))


def modality_routing_config(args: Namespace) -> ModalityRoutingConfig:
    """Builds the routers' config."""
    return ModalityRoutingConfig(
        STRATEGIES[args.modality_routing].from_arguments(args),
        eps=args.smar_eps,
        scope=args.smar_scope,
        router_bias=args.modality_router_bias,
        modalities=modality_table(args),
    )


def vision_config(args: Namespace) -> VisionConfig:
    """Builds the vision encoder's config."""
    return VisionConfig(
        model=args.vision_model,
        image_size=args.image_size,
        pixel_shuffle=args.pixel_shuffle,
        feature_layer=args.vision_feature_layer,
        feature_scale=args.vision_feature_scale,
        has_weights=not args.load or not checkpoint_exists(args.load),
    )


def language_config(args: Namespace) -> LanguageConfig:
    """Builds what the language model needs in addition to Megatron's TransformerConfig."""
    return LanguageConfig(
        vocab_size=args.padded_vocab_size,
        true_vocab_size=args.true_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        output_bias=args.output_bias,
        layers=LayerConfig(args.parallel_block, args.qk_norm_scope, args.latent_norm_epsilon, args.skip_unused_experts),
    )


def transformer_config(args: Namespace) -> TransformerConfig:
    """Builds Megatron's config of the language model, with the activation that Megatron has no flag for."""
    config = core_transformer_config_from_args(args)
    if args.gelu_tanh:
        # Megatron has no fused kernel for this activation function.
        config.activation_func, config.bias_activation_fusion = partial(F.gelu, approximate="tanh"), False
    return config


def image_config(args: Namespace) -> ImageConfig:
    """Builds the config that defines how images become tiles."""
    return ImageConfig(
        image_size=args.image_size,
        min_tiles=args.min_tiles,
        max_tiles=args.max_tiles,
        use_thumbnail=args.use_thumbnail,
    )


def data_config(args: Namespace) -> DataConfig:
    """Builds the config of the data: what is read, and how it is padded for the parallel layout."""
    # Pipeline parallelism and the all-gather dispatcher need one shape on every rank; else the longest sample decides.
    one_shape = args.pipeline_model_parallel_size > 1 or args.moe_token_dispatcher_type == "allgather"
    shards = args.tensor_model_parallel_size if args.sequence_parallel else 1
    shards *= 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    return DataConfig(
        data_path=args.data_path[0],
        valid_data_path=args.valid_data_path[0] if args.valid_data_path else None,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        template=args.conversation_template,
        modalities=modality_table(args),
        tokens_per_tile=tokens_per_tile(vision_config(args)),
        image=image_config(args),
        pad_to=args.seq_length if one_shape else None,
        pad_to_multiple_of=shards,
        packing_buffer_size=args.packing_buffer_size,
        packing_max_tiles=args.packing_max_tiles,
        packing_multiple_of=2 * args.context_parallel_size if args.context_parallel_size > 1 else 1,
        text_only_ratio=args.text_only_ratio,
        num_workers=args.num_workers,
        shuffle_buffer_size=args.shuffle_buffer_size,
        seed=args.seed,
        rejects_dir=args.rejects_dir,
        max_skip_ratio=args.max_skip_ratio,
    )


@dataclass(frozen=True)
class RunConfig:
    """The configs that a run's flags become, built once after Megatron has validated the flags.

    Attributes:
        routing: The routers' config, with the table of modalities.
        vision: The vision encoder's config.
        images: How images are split into tiles.
        language: What the language model takes beside Megatron's TransformerConfig.
        connector: Type of the connector.
        freeze: Parts that do not learn.
        template: Name of the conversation template.
        monitor: What is watched of the routing.
        reliability: What the run does when something fails.
        data: Which data is read; None for a program that reads none.
        loss_weighting: How much each token counts in the loss; None for Megatron's mean.
        balance_vision: Whether replicas share the vision encoder's work.
    """

    routing: ModalityRoutingConfig
    vision: VisionConfig
    images: ImageConfig
    language: LanguageConfig
    connector: ConnectorType
    freeze: frozenset[str]
    template: str
    monitor: MonitorConfig
    reliability: ReliabilityConfig
    data: DataConfig | None = None
    loss_weighting: LossWeighting | None = None
    balance_vision: bool = False

    @classmethod
    def from_arguments(cls, args: Namespace, needs_data: bool = True) -> RunConfig:
        """Builds all of them.

        Args:
            args: The flags, validated; the vocabulary's size is known.
            needs_data: Whether the program reads --data-path.
        """
        return cls(
            routing=modality_routing_config(args),
            vision=vision_config(args),
            images=image_config(args),
            language=language_config(args),
            connector=args.connector,
            freeze=frozenset(args.freeze),
            template=args.conversation_template,
            monitor=MonitorConfig.from_arguments(args),
            reliability=ReliabilityConfig.from_arguments(args),
            data=data_config(args) if needs_data else None,
            loss_weighting=args.loss_weighting,
            balance_vision=args.balance_vision,
        )

    @property
    def modalities(self) -> Modalities:
        """The run's table of modalities."""
        return self.routing.modalities

    @property
    def tokens_per_tile(self) -> int:
        """Number of vision tokens per tile."""
        return tokens_per_tile(self.vision)


_RUN: list[RunConfig] = []


def set_run_config(run: RunConfig) -> None:
    """Makes a config this process's, as Megatron keeps its arguments: `pretrain()` calls providers without any."""
    _RUN[:] = [run]


def get_run_config() -> RunConfig:
    """This process's config, which `training.setup.parse_arguments` has set."""
    if not _RUN:
        raise RuntimeError("no run is configured: call training.setup.parse_arguments first.")
    return _RUN[0]
