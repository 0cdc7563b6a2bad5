# SPDX-License-Identifier: Apache-2.0
"""Published speeds and memory of MoE models, to compare plans with; sources beside the figures.

The models are described by hand, since not all of them can be built here. Of Qwen3.6, attention that is linear in the
sequence (gated delta net) is counted by its projections, and of the layer that predicts further ahead only the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_smar.planning.layout import Batch, Layout
from megatron_smar.planning.operations import Recomputation
from megatron_smar.planning.shape import DecoderShape, ModelShape, Parameter, VisionShape

ALL = frozenset({"vision", "connector", "embeddings", "attention", "norms", "dense", "experts", "router"})
FULL = Recomputation("full", layers=1000)


@dataclass(frozen=True)
class Published:
    """A published run on H100 GPUs.

    Attributes:
        name: What was run.
        source: Where the figures are.
        shape: The model.
        layout: The parallel layout.
        batch: What a step trains on.
        tokens: Tokens per second and GPU, all positions counted; None where only memory is published.
        peak: Allocated memory in GiB at the peak; None where only speed is published.
        even: Whether routing was forced to be even.
        fp8: Whether matrix products were in FP8, with twice the peak.
    """

    name: str
    source: str
    shape: ModelShape
    layout: Layout
    batch: Batch
    tokens: float | None = None
    peak: float | None = None
    even: bool = True
    fp8: bool = False


def text_model(decoder: DecoderShape, norms_per_head: bool = False) -> ModelShape:
    """Returns a language model without pictures, with its parameters."""
    none = VisionShape(1, 0, 1, 1, 1, 0, 0, 1)
    return ModelShape(decoder, none, ALL - {"vision", "connector"}, tuple(_parameters(decoder, norms_per_head)))


def _parameters(decoder: DecoderShape, norms_per_head: bool) -> list[Parameter]:
    hidden, layers = decoder.hidden, range(len(decoder.moe_layers))
    embedding = decoder.vocabulary * hidden
    projected = decoder.query_width * hidden
    found = [Parameter("language_model.embedding.word_embeddings.weight", embedding, "embeddings", None, True)]
    for layer in layers:
        found.append(Parameter("input_layernorm", hidden, "norms", layer))
        found.append(Parameter("linear_proj", projected, "attention", layer, True))
        found.append(Parameter("linear_qkv", decoder.attention_weights - projected, "attention", layer, True))
        if norms_per_head:
            found += [Parameter(name, decoder.head_size, "norms", layer) for name in ("q_norm", "k_norm")]
        found.append(Parameter("pre_mlp_layernorm", hidden, "norms", layer))
        found.append(Parameter("router", decoder.experts * hidden, "router", layer))
        first = (2 if decoder.gated else 1) * hidden * decoder.expert_ffn
        for expert in range(decoder.experts):
            found.append(Parameter("linear_fc1", first, "experts", layer, True, expert))
            found.append(Parameter("linear_fc2", hidden * decoder.expert_ffn, "experts", layer, True, expert))
        if decoder.shared_ffn:
            found.append(Parameter("shared_experts", decoder.shared_weights, "experts", layer, True))
    found.append(Parameter("language_model.decoder.final_layernorm.weight", hidden, "norms"))
    return [*found, Parameter("language_model.output_layer.weight", embedding, "embeddings", None, True)]


def _decoder(
    layers: int, hidden: int, heads: tuple[int, int, int], ffn: int, experts: int, top_k: int, vocabulary: int
) -> DecoderShape:
    """Returns a mixture with grouped-query attention; `heads` are those of queries, of keys, and their size."""
    queries, groups, size = heads
    return DecoderShape(
        hidden=hidden,
        moe_layers=(True,) * layers,
        attention_weights=hidden * size * (2 * queries + 2 * groups),
        score_width=2 * queries * size,
        heads=queries,
        query_groups=groups,
        head_size=size,
        ffn=ffn,
        expert_ffn=ffn,
        shared_ffn=0,
        latent=0,
        gated=True,
        experts=experts,
        top_k=top_k,
        vocabulary=vocabulary,
    )


MIXTRAL = text_model(_decoder(32, 4096, (32, 8, 128), 14336, 8, 2, 32000))
QWEN3 = text_model(_decoder(48, 2048, (32, 4, 128), 768, 128, 8, 151936), norms_per_head=True)
SMALL_MIXTRAL = text_model(_decoder(4, 2048, (16, 8, 128), 5440, 8, 2, 32000))


def _qwen36() -> ModelShape:
    """Returns Qwen3.6-35B-A3B: 40 layers, of which every fourth has full attention."""
    full, linear, layers = 10, 30, 40
    hidden = 2048
    with_scores = hidden * 256 * (3 * 16 + 2 * 2)  # queries and their gate, output, keys and values
    delta = hidden * 128 * (2 * 16 + 3 * 32) + 2 * hidden * 32  # keys and queries; values, gate, output; two scalars
    weights = (full * with_scores + linear * delta) // layers
    decoder = DecoderShape(
        hidden=hidden,
        moe_layers=(True,) * layers,
        attention_weights=weights,
        score_width=full * 2 * 16 * 256 // layers,
        heads=16,
        query_groups=2,
        head_size=256,
        ffn=512,
        expert_ffn=512,
        shared_ffn=512,
        latent=0,
        gated=True,
        experts=256,
        top_k=8,
        vocabulary=2 * 248320,  # the output layer runs twice
    )
    tower = VisionShape(1152, 27, 16, 4304, 784, 0, 3 * 2 * 16**2, 196)
    plain = text_model(decoder)
    encoder = Parameter("vision_model", tower.layers * tower.layer_weights, "vision")
    return ModelShape(decoder, tower, ALL, (encoder, *plain.parameters))


QWEN36 = _qwen36()
_MEGATRON = "Megatron-LM, core/transformer/moe/README.md"
_BRIDGE = "Megatron-Bridge, model verification card"
_ESTIMATOR = "mbridge, memory_estimator/README.md, column Real"
_GOLDEN = "Megatron-LM, functional tests' golden values"

_MIXTRAL_64 = Layout(64, pipeline=4, chunks=8, expert=8)
_MIXTRAL_BATCH = Batch(4096, 256)
_QWEN3_16 = Layout(16, expert=16, flex=True)
_QWEN3_BATCH = Batch(4096, 1024)
_VLM_16 = Layout(16, pipeline=2, expert=8, overlap=False, flex=True)


def _small(tensor: int, micro_batch: int, peak: float) -> Published:
    layout = Layout(8, tensor=tensor, expert_tensor=tensor, micro_batch=micro_batch, overlap=False)
    name = f"Mixtral, 4 layers of 2048, TP{tensor} MBS{micro_batch}"
    return Published(name, _ESTIMATOR, SMALL_MIXTRAL, layout, Batch(4096, 8 // tensor * micro_batch), peak=peak)


RUNS: tuple[Published, ...] = (
    Published("Mixtral 8x7B, MCore 0.8", _MEGATRON, MIXTRAL, _MIXTRAL_64, _MIXTRAL_BATCH, 5282),
    Published("Mixtral 8x7B, MCore 0.9", _MEGATRON, MIXTRAL, _MIXTRAL_64, _MIXTRAL_BATCH, 5643),
    Published("Qwen3-30B-A3B, FP8", "Megatron-Bridge, performance summary 26.04.01", QWEN3, _QWEN3_16, _QWEN3_BATCH,
              8960, fp8=True),
    Published("Qwen3-30B-A3B", _BRIDGE, QWEN3, _QWEN3_16, _QWEN3_BATCH, 10607),
    Published("Qwen3-30B-A3B, exchange overlapped", _BRIDGE, QWEN3, replace(_QWEN3_16, overlap_experts=True),
              _QWEN3_BATCH, 12488, 62.17),
    Published("Qwen3-30B-A3B, all-to-all", "Megatron-Bridge, pull request 3880", QWEN3, replace(_QWEN3_16, flex=False),
              _QWEN3_BATCH, 4096 * 1024 / 16 / 42.21, 61.35e9 / 1024**3),
    Published("Qwen3-30B-A3B, AutoModel", "NeMo AutoModel, performance summary", QWEN3,
              Layout(8, expert=8, micro_batch=4, flex=True, recomputation=FULL), Batch(4096, 512), 12040),
    Published("Qwen3.6-35B-A3B, pictures", _BRIDGE, QWEN36,
              replace(_VLM_16, recomputation=Recomputation("selective", ("core_attn", "moe_act"))),
              Batch(4096, 512, tiles=1), 5885, even=False),
    Published("Qwen3.6-35B-A3B, pictures, all recomputed", _BRIDGE, QWEN36,
              replace(_VLM_16, recomputation=FULL), Batch(4096, 32, tiles=1), 2507,
              even=False),
    Published("Qwen3.6-35B-A3B, pictures, 8192", _BRIDGE, QWEN36,
              Layout(32, pipeline=4, context=2, expert=8, micro_batch=2, overlap=False, recomputation=FULL),
              Batch(8192, 512, tiles=1), 3557, even=False),
    Published("Mixtral 8x7B, TP2 PP4 VPP8", _GOLDEN, MIXTRAL,
              Layout(64, tensor=2, pipeline=4, chunks=8, expert=8), _MIXTRAL_BATCH,
              4096 * 256 / 64 / 3.306, 33.07, even=False),
    _small(2, 1, 6.6),
    _small(2, 2, 8.0),
    _small(1, 1, 11.2),
    _small(1, 2, 13.8),
)  # fmt: skip
