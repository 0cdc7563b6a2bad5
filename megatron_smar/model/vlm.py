# SPDX-License-Identifier: Apache-2.0
"""The vision-language model: vision encoder, connector, and Megatron's GPTModel with modality-aware MoE layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_smar.model.connector import Connector, ConnectorType
from megatron_smar.model.layers.parallel_block import add_output_bias
from megatron_smar.model.layers.score_layer import AccumulatesScores
from megatron_smar.model.layers.specs import LayerConfig, decoder_block_spec
from megatron_smar.model.masked_loss import masked_loss
from megatron_smar.model.parts import freeze_parameters, frozen_parts
from megatron_smar.model.score_transport import (
    append_scores,
    score_columns,
    score_dtype,
    split_scores,
    with_wider_activations,
)
from megatron_smar.model.vision import VisionConfig, VisionEncoder
from megatron_smar.model.vision_balance import TileExchange
from megatron_smar.model.vocabulary import mask_padding
from megatron_smar.routing.config import ModalityRoutingConfig
from megatron_smar.routing.modalities import modality_mask_from_ids
from megatron_smar.routing.step import TrainingStep
from megatron_smar.routing.token_columns import join_columns


@dataclass(frozen=True)
class LanguageConfig:
    """GPTModel's arguments other than its TransformerConfig, under Megatron's names, and settings it does not have.

    Attributes:
        vocab_size: Number of rows of the embedding, padded for the parallel layout.
        true_vocab_size: Number of those rows that are tokens; None if all are.
        output_bias: Whether the output layer has a bias (Phi).
        layers: Settings of the decoder's layers that Megatron's TransformerConfig does not have.
    """

    vocab_size: int
    max_sequence_length: int
    position_embedding_type: str = "rope"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    seq_len_interpolation_factor: float | None = None
    share_embeddings_and_output_weights: bool = False
    fp16_lm_cross_entropy: bool = False
    parallel_output: bool = True
    true_vocab_size: int | None = None
    output_bias: bool = False
    layers: LayerConfig = field(default_factory=LayerConfig)

    def of_gpt_model(self) -> dict[str, Any]:
        """Returns the settings that are GPTModel's own arguments."""
        own = ("true_vocab_size", "output_bias", "layers")
        return {name: value for name, value in vars(self).items() if name not in own}


class VisionLanguageModel(MegatronModule):
    """One pipeline stage of the model.

    The first stage encodes the tiles and puts their features at the positions of the batch's placeholder tokens. Every
    stage receives the modality of each position and passes it to its routers with the activations.

    Args:
        config: Megatron's TransformerConfig of the language model.
        language: The other settings of the language model.
        vision: Settings of the vision encoder.
        connector: Type of the connector.
        modality_routing: Settings of the routers.
        freeze: Parts that are not trained: any of `megatron_smar.model.parts.PARTS`.
        pre_process: Whether this is the first pipeline stage.
        post_process: Whether this is the last pipeline stage.
        pg_collection: Megatron's process groups; None for the global ones.
        vp_stage: Index of the virtual pipeline stage, or None.
        balance_vision: Whether the replicas share the work of the frozen vision encoder while the model trains.
    """

    def __init__(
        self,
        config: TransformerConfig,
        language: LanguageConfig,
        vision: VisionConfig,
        connector: ConnectorType,
        modality_routing: ModalityRoutingConfig,
        freeze: frozenset[str] = frozenset({"vision"}),
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        balance_vision: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.modality_routing = modality_routing
        self.step = TrainingStep()
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        self.vision_model: VisionEncoder | None = None
        self.connector: Connector | None = None
        if pre_process:
            self.vision_model = VisionEncoder(vision, config.params_dtype, trainable="vision" not in freeze)
            self.connector = Connector(
                connector, self.vision_model.output_size, config.hidden_size, config.params_dtype
            )
        self._exchange: TileExchange | None = None
        if pre_process and balance_vision and self.pg_collection.dp.size() > 1:
            self._exchange = TileExchange(self.pg_collection.dp, parallel_state.get_data_parallel_group_gloo())
        self.language_model = GPTModel(
            config=config,
            transformer_layer_spec=decoder_block_spec(config, modality_routing, vp_stage, language.layers, self.step),
            pre_process=pre_process,
            post_process=post_process,
            # Inserting the features needs the embeddings of the full sequence; they are scattered afterwards.
            scatter_embedding_sequence_parallel=False,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
            **language.of_gpt_model(),
        )
        if post_process and language.output_bias:
            add_output_bias(self.language_model.output_layer)
        if post_process and language.true_vocab_size is not None:
            sizes = language.true_vocab_size, language.vocab_size
            mask_padding(self.language_model.output_layer, *sizes, self.pg_collection.tp)
        self.skips_unused = language.layers.skips_unused
        self.has_scores = modality_routing.strategy.needs_attention_scores
        self._received: Tensor | None = None  # scores from the previous stage, [s, b, M]
        if self.has_scores and not (pre_process and post_process):
            width = score_columns(modality_routing.num_modalities, config.pipeline_dtype or config.params_dtype)
            self.config = with_wider_activations(config, width)
        freeze_parameters(self, frozen_parts(freeze))
        self.trains = any(parameter.requires_grad for parameter in self.parameters())

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Sets the previous stage's activations [s, b, h], with its scores; called by Megatron's schedules."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if self.has_scores and received is not None:
            received, self._received = split_scores(received, self.language_model.config.hidden_size)
        self.language_model.set_input_tensor(received)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Returns the tied embedding, whose gradient Megatron reduces between the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        modality_ids: Tensor,
        pixel_values: Tensor | None = None,
        vision_index: Tensor | None = None,
        labels: Tensor | None = None,
        loss_positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sample_ids: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
    ) -> Tensor:
        """Runs one micro-batch through this stage.

        Args:
            input_ids: [b, s], with placeholders at the positions of vision tokens.
            position_ids: [b, s].
            modality_ids: [b, s]: rows of the table of modalities (0 text, 1 vision, ...), -1 padding.
            pixel_values: [tiles, 3, H, W], in the order of the placeholders; used on the first stage only.
            vision_index: [b, s], at positions filled by a vision feature its row in the features of all tiles, else -1.
            labels: [b, s], or None.
            loss_positions: The positions whose loss counts, [n], as indices of [s, b], flattened; None for all.
            attention_mask: None for causal.
            packed_seq_params: Boundaries of the sequences of a pack, on the host, for b = 1; each sequence attends only
                to itself.
            sample_ids: Index of each position's sample, [b, s]; needed to train with a strategy that `needs_samples`.
            inference_context: Megatron's key-value cache, for decoding under its `InferenceMode`; None without.

        Returns:
            On the last stage the loss per token [b, s], 0 outside `loss_positions`, or without labels the logits
            [b, s, vocabulary / tp]; on the other stages the activations [s, b, h]. With `inference_context` the last
            position's logits, gathered over the tensor-parallel ranks, [b, 1, vocabulary].
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embed(input_ids, position_ids, pixel_values, vision_index)
        mask = modality_mask_from_ids(self._own_shard(modality_ids), self.modality_routing.num_modalities)
        columns, scores = mask, None
        skips = self.skips_unused and loss_positions is not None
        if self.training and (skips or self.modality_routing.strategy.needs_samples):
            if sample_ids is None:
                raise ValueError("the layers need each position's sample, and sample_ids is missing.")
            predicts = _marked(loss_positions if skips else None, input_ids)
            own = self._own_shard(sample_ids), self._own_shard(predicts)
            columns = join_columns(mask, *own, score_dtype(self.config.params_dtype))
            scores = self._first_scores(mask) if self.has_scores else None
        # Deferred, the output layer's weight gradient is computed from its sequence-parallel input, which has all rows.
        deferred = self.config.defer_embedding_wgrad_compute
        leaves_out_logits = labels is not None and loss_positions is not None and not deferred
        output = self.language_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            decoder_input=decoder_input,
            labels=labels,
            padding_mask=columns,
            packed_seq_params=self._place_ends(packed_seq_params),
            inference_context=inference_context,
            runtime_gather_output=None if inference_context is None else True,
            extra_block_kwargs={"context": scores},
            output_processor=masked_loss if leaves_out_logits else None,
            output_processor_context=loss_positions,
        )
        if self.has_scores and not self.post_process:
            output = append_scores(output, self._last_scores(scores, output))
        return output

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns Megatron's sharded state dict, after the strategies' statistics of the last step are settled."""
        self.step.settle()
        return super().sharded_state_dict(*args, **kwargs)

    def _first_scores(self, mask: Tensor) -> Tensor:
        """Returns the scores that enter this stage's first layer, [s, b, M]: in the model's first layer hard labels."""
        if self.pre_process:
            return mask.transpose(0, 1).to(score_dtype(self.config.params_dtype))
        assert self._received is not None
        received, self._received = self._received, None
        return received

    def _last_scores(self, first: Tensor | None, output: Tensor) -> Tensor:
        """Returns the scores that leave this stage's last layer, [s, b, M]; zeros where none are needed."""
        if first is None:
            shape = (*output.shape[:2], self.modality_routing.num_modalities)
            return torch.zeros(shape, dtype=score_dtype(output.dtype), device=output.device)
        layers = self.language_model.decoder.layers
        if not len(layers):  # a stage without layers
            return first
        assert isinstance(layers[-1], AccumulatesScores)
        last, layers[-1].last_scores = layers[-1].last_scores, None
        assert last is not None
        return last

    def _place_ends(self, packed: PackedSeqParams | None) -> PackedSeqParams | None:
        """Returns the boundaries of a pack's sequences on the device where the layers need them.

        Local layers and Megatron's unfused rotary embedding split by numbers on the host: from the device these would
        be copied again in every layer and pass. Transformer Engine's kernels need the boundaries on the GPU.
        """
        local = self.config.transformer_impl == "local" and not self.config.apply_rope_fusion
        if packed is None or local:
            return packed
        ends = packed.cu_seqlens_q.pin_memory().cuda(non_blocking=True)
        return replace(packed, cu_seqlens_q=ends, cu_seqlens_kv=ends)

    def _own_shard(self, positions: Tensor) -> Tensor:
        """Returns this rank's shard of [b, s]; with sequence parallelism tensor-parallel ranks share the sequence."""
        if not self.config.sequence_parallel:
            return positions
        group = self.pg_collection.tp
        return positions.chunk(group.size(), dim=1)[group.rank()]

    def _embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor | None,
        vision_index: Tensor | None,
    ) -> Tensor:
        """Returns embeddings with the vision features inserted, [s, b, h]; sharded under sequence parallelism."""
        assert self.vision_model is not None and self.connector is not None
        embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=position_ids)
        exchange = self._exchange if self.training else None
        features = None
        if pixel_values is not None and (len(pixel_values) or exchange is not None):
            features = self.vision_model.encode(pixel_values, self.pg_collection.tp_cp, exchange)
        if features is None or not len(features):
            if torch.is_grad_enabled():
                embeddings = embeddings + self._unused_vision(embeddings)
        else:
            if vision_index is None:
                raise ValueError("pixel_values were given without vision_index; see megatron_smar.training.batch.")
            features = self.connector(features).flatten(0, 1)
            placed = features[_spread(vision_index, len(features))].transpose(0, 1).to(embeddings.dtype)
            # Contiguous: otherwise the strides persist to the stage's output, which is sent to the next stage.
            embeddings = torch.where((vision_index >= 0).t().unsqueeze(-1), placed, embeddings).contiguous()
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        if self.trains and torch.is_grad_enabled() and not embeddings.requires_grad:
            # Recomputed layers get no gradients unless their input requires a gradient.
            embeddings.requires_grad_()
        return embeddings

    def _unused_vision(self, like: Tensor) -> Tensor:
        """Returns zero, computed by encoder and connector, to keep their parameters in the graph without images.

        If the language model is frozen, the loss would otherwise have no gradient, and the rank would skip its backward
        pass and with it the collectives in which the other ranks wait.
        """
        assert self.vision_model is not None and self.connector is not None
        side = self.vision_model.vision.image_size
        tile = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
        if self.vision_model.trainable:
            features = self.vision_model(tile)
        else:
            features = torch.zeros(1, 1, self.vision_model.output_size, device=like.device, dtype=like.dtype)
        return self.connector(features).sum().to(like.dtype) * 0.0


def _marked(positions: Tensor | None, like: Tensor) -> Tensor:
    """Returns which positions are given, [b, s] bool as `like`; all for None.

    Args:
        positions: Indices of [s, b], flattened, [n].
        like: [b, s].
    """
    if positions is None:
        return torch.ones_like(like, dtype=torch.bool)
    marks = torch.zeros(like.numel(), dtype=torch.bool, device=like.device).index_fill(0, positions, True)
    return marks.view(like.t().shape).t()


def _spread(index: Tensor, rows: int) -> Tensor:
    """Returns the row to read at each position, [b, s]: `index`, or where it is -1 an arbitrary row.

    What is read at -1 is not used, but its gradient (zeros) is accumulated. The arbitrary rows differ from position to
    position, because CUDA accumulates the gradients of a shared row one after another.
    """
    positions = torch.arange(index.numel(), device=index.device).view_as(index)
    return torch.where(index < 0, positions % rows, index)
