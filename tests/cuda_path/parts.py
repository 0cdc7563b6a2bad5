# SPDX-License-Identifier: Apache-2.0
"""Runs every part of the model on tensors without storage, and records the host's waits and the outputs' types.

    python -m tests.cuda_path.parts FOLDER    # folder for a vision encoder and the result, results.json

On `cuda` only the forward pass runs; on `meta`, where torch's autograd needs no stream from the driver, also backward.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # torch.compile would ask the driver for a stream

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.conftest import free_port
from tests.cuda_path import controls, storage_less
from tests.models import MIXTURE, build_hf_model, transformer_config

IMAGE, SIDE, TOKENS, HIDDEN, EXPERTS = 5, 32, 4, 48, 4
PACK = [10, 8, 6]
LENGTH = sum(PACK)
Part = Callable[[], Any]


def answer(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns the values for a read: the same number of tokens per expert, PACK for a pack's lengths, else zeros."""
    if dtype.is_floating_point or shape.numel() not in (EXPERTS, len(PACK)):
        return torch.zeros(shape)
    return torch.full(shape, 2 * LENGTH // EXPERTS) if shape.numel() == EXPERTS else torch.tensor(PACK)


def build(folder: Path, config: Any, **language: Any) -> Any:
    """Builds a tiny model in bf16 as in training, on the CPU, with no part frozen."""
    from megatron_smar.model.vision import VisionConfig
    from megatron_smar.model.vlm import LanguageConfig, VisionLanguageModel
    from megatron_smar.routing.config import ModalityRoutingConfig
    from megatron_smar.routing.strategies.smar import SmarConfig

    model = VisionLanguageModel(
        config,
        LanguageConfig(vocab_size=128, max_sequence_length=256, **language),
        VisionConfig(str(folder), image_size=SIDE),
        "mlp2x_gelu",
        ModalityRoutingConfig(SmarConfig()),
        freeze=frozenset(),
    )
    return model.bfloat16().train()


def towers(folder: Path) -> list[Any]:
    """Builds the vision encoders other than InternVL's: CLIP's and SigLIP's, in bf16 and trainable, on the CPU."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    from megatron_smar.model.vision import VisionConfig, VisionEncoder

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"image_size": SIDE, "patch_size": 8}
    CLIPVisionModel(CLIPVisionConfig(**sizes)).save_pretrained(folder / "clip")
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(folder / "siglip")
    configs = (VisionConfig(str(folder / kind), image_size=SIDE, feature_layer=-2) for kind in ("clip", "siglip"))
    return [VisionEncoder(config, torch.bfloat16, trainable=True) for config in configs]


def build_models(folder: Path) -> list[Any]:
    """Builds models with grouped queries, latent attention, recomputation, Phi's and OLMoE's layers; then `towers`."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_smar.model.layers.specs import LayerConfig

    half = {"bf16": True, "params_dtype": torch.bfloat16, "moe_router_dtype": "fp32", "num_layers": 2}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    latent = MLATransformerConfig(
        hidden_size=HIDDEN,
        ffn_hidden_size=96,
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_head_dim=12,
        qk_pos_emb_head_dim=8,
        v_head_dim=16,
        rope_type="rope",
        **MIXTURE,
        **half,
    )
    phi = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu, "add_bias_linear": True}
    models = [build(folder, config) for config in (transformer_config(**half), latent)]
    models.append(build(folder, transformer_config(**half, **recompute)))
    parallel = transformer_config(**half, **phi, normalization="LayerNorm")
    models.append(build(folder, parallel, output_bias=True, layers=LayerConfig(parallel_block=True)))
    normed = transformer_config(**half, qk_layernorm=True)
    models.append(build(folder, normed, layers=LayerConfig(qk_norm_scope="projection")))
    return models + towers(folder)


def batch(lengths: list[int] | None = None, images: int = 1) -> Any:
    """Returns one micro-batch with one row, copied from the host to the device by `prepare_batch`."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_smar.data.batch import VisionLanguageBatch
    from megatron_smar.training.batch import prepare_batch

    ids = torch.tensor([[IMAGE] * TOKENS * images + [9] * (LENGTH - TOKENS * images)])
    host = VisionLanguageBatch(
        __key__=["0"],
        __restore_key__=(),
        input_ids=ids,
        labels=ids,
        loss_mask=torch.ones(1, LENGTH),
        padding_mask=torch.tensor([[False] * LENGTH]),
        pixel_values=torch.zeros(images, 3, SIDE, SIDE, dtype=torch.uint8),
        lengths=None if lengths is None else torch.tensor(lengths),
    )
    return prepare_batch(host, [IMAGE], TOKENS, True, ProcessGroupCollection.use_mpu_process_groups(), (0.1, 0.2))


def model_loss(model: Any, inputs: Any) -> Tensor:
    """Returns the model's loss of a batch, as in the forward step."""
    from megatron_smar.training.loss import lm_loss

    output = model(**inputs.model_inputs(), labels=inputs.labels, loss_positions=inputs.loss_positions)
    return lm_loss(inputs.loss_mask, inputs.shares, True, output)[0]


def parts(models: list[Any], device: torch.device, mode: FakeTensorMode) -> Iterator[tuple[str, Any, Part]]:
    """Yields for each part of `build_models` its name, the modules with its parameters, and its forward pass."""
    model, latent, recomputed, phi, olmoe, clip, siglip = models
    from megatron.core.transformer.enums import AttnMaskType

    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

    def rotary(of: Any) -> Any:
        return of.language_model.rotary_pos_emb(LENGTH, packed_seq=True)

    layer, latent_layer = (of.language_model.decoder.layers[0] for of in (model, latent))
    attention, moe, language = layer.self_attention, layer.mlp, model.language_model
    core = attention.core_attention
    with storage_less.Waits(mode, answer):
        plain, packed = batch(), batch(PACK)
    hidden = (LENGTH, 1, HIDDEN)
    mask = torch.ones(LENGTH, 1, 2, dtype=torch.bool, device=device)
    tiles = torch.empty(1, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    ends = packed.packed_seq_params
    yield "batch", None, lambda: batch(PACK).loss_mask
    yield "vision encoder", model.vision_model, lambda: model.vision_model(tiles)
    yield "vision encoder, CLIP", clip, lambda: clip(tiles)
    yield "vision encoder, SigLIP", siglip, lambda: siglip(tiles)
    yield "connector", model.connector, lambda: model.connector(values(1, TOKENS, model.vision_model.output_size))
    yield (
        "embedding merge",
        (language.embedding, model.connector),
        lambda: model._embed(plain.input_ids, plain.position_ids, tiles, plain.vision_index),
    )
    yield "norm", layer.input_layernorm, lambda: layer.input_layernorm(values(*hidden))
    for name, groups in (("attention", 4), ("attention, grouped queries", 2)):
        shapes = [(LENGTH, 1, heads, 12) for heads in (4, groups, groups)]
        yield (
            name,
            core,
            lambda shapes=shapes: core(*(values(*shape) for shape in shapes), None, attn_mask_type=AttnMaskType.causal),
        )
    yield (
        "attention, packed",
        core,
        lambda: core(*(values(LENGTH, heads, 12) for heads in (4, 2, 2)), None, packed_seq_params=ends),
    )
    yield (
        "attention layer, packed",
        attention,
        lambda: attention(values(*hidden), None, rotary_pos_emb=rotary(model), packed_seq_params=ends)[0],
    )
    on_device = dataclasses.replace(ends, cu_seqlens_q=ends.cu_seqlens_q.cuda(), cu_seqlens_kv=ends.cu_seqlens_q.cuda())
    yield (
        "attention layer, packed, lengths on the device",
        attention,
        lambda: attention(values(*hidden), None, rotary_pos_emb=rotary(model), packed_seq_params=on_device)[0],
    )
    latent_attention = latent_layer.self_attention
    yield "latent attention layer", latent_attention, lambda: latent_attention(values(*hidden), None)[0]
    yield (
        "latent attention layer, packed",
        latent_attention,
        lambda: latent_attention(values(*hidden), None, packed_seq_params=ends)[0],
    )
    yield "router", moe.router, lambda: moe.router(values(*hidden), mask)[0]
    yield "router's logits", moe.router, lambda: moe.router.gating(values(*hidden))
    yield "router without modality biases", moe.router, lambda: _without_biases(moe.router, values(*hidden), mask)
    yield "routing statistics", moe.router, lambda: _statistics(moe.router, values(*hidden), mask).weights
    splits = torch.tensor([2 * LENGTH // EXPERTS] * EXPERTS)
    yield (
        "experts",
        moe.experts,
        lambda: moe.experts(values(2 * LENGTH, HIDDEN), splits, values(2 * LENGTH, dtype=torch.float32))[0],
    )
    yield "MoE layer", moe, lambda: moe(values(*hidden), padding_mask=mask.transpose(0, 1))[0]
    yield (
        "output layer and loss",
        language.output_layer,
        lambda: language.compute_language_model_loss(plain.labels, language.output_layer(values(*hidden))[0]),
    )
    yield "model", model, lambda: model_loss(model, batch())
    yield "model, text only", model, lambda: model_loss(model, batch(images=0))
    yield "model, packed", model, lambda: model_loss(model, batch(PACK))
    yield "model, packed, recomputed", recomputed, lambda: model_loss(recomputed, batch(PACK))
    yield "model, latent attention, packed", latent, lambda: model_loss(latent, batch(PACK))
    yield "model, parallel blocks and biases, packed", phi, lambda: model_loss(phi, batch(PACK))
    yield "model, norms of projections, packed", olmoe, lambda: model_loss(olmoe, batch(PACK))
    yield "gradient norm and clipping", None, lambda: _clipped([values(*hidden).detach().float() for _ in range(3)])
    yield "evaluation, a batch", None, lambda: _evaluated(model, device)


def _without_biases(router: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """Runs the router as with --no-modality-router-bias: the routing weights then have the router's dtype."""
    biases, router.modality_bias = router.modality_bias, None
    try:
        return router(hidden, mask)[0]
    finally:
        router.modality_bias = biases


def _clipped(gradients: list[Tensor]) -> Tensor:
    """Computes the norm, which Megatron then reads once, and scales the gradients."""
    from megatron_smar.runtime import torch_adam

    norm, _ = torch_adam.l2_norm(0, overflow := gradients[0].new_zeros(1), [gradients], False)
    torch_adam.scale(0, overflow, [gradients, gradients], 0.5)
    return norm


def _evaluated(model: Any, device: torch.device) -> Tensor:
    """Scores one sample, with the number of tokens that `answer` assumes; sample and collation are on the host."""
    from megatron_smar.data.batch import EncodedSample, collate

    with _disable_current_modes():
        ids = torch.tensor([IMAGE] * TOKENS + [9] * (LENGTH - TOKENS))
        sample = EncodedSample(
            __key__="0",
            __restore_key__=(),
            input_ids=ids,
            labels=ids,
            loss_mask=torch.ones(LENGTH),
            pixel_values=torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8),
        )
    from megatron_smar.evaluation import evaluator

    evaluator.collate = storage_less.on_host(collate)
    scores = evaluator.Evaluator(model, [IMAGE], TOKENS, 0)._score_batch([sample], [None])
    return torch.ones(len(scores), device=device)


def _statistics(router: Any, hidden: Tensor, mask: Tensor) -> Any:
    router(hidden, mask)
    return router._pending.wait()[0]


def measure(owner: Any, forward: Part, device: torch.device, mode: FakeTensorMode) -> dict[str, Any]:
    """Records the waits of both passes and the types of their results; an error is recorded too."""
    modules = [] if owner is None else owner if isinstance(owner, tuple) else (owner,)
    parameters = {name: p for module in modules for name, p in module.named_parameters()}
    found: dict[str, Any] = {"parameters": {name: str(p.dtype) for name, p in parameters.items()}}
    try:
        with storage_less.Waits(mode, answer) as waits:
            output = forward()
        found |= {"forward": dict(waits.by), "output": str(output.dtype), "device": output.device.type}
        if device.type == "meta" and output.requires_grad:
            with storage_less.Waits(mode, answer) as waits:
                output.sum().backward()
            grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            found |= {"backward": dict(waits.by), "gradients": {name: str(g.dtype) for name, g in grads.items()}}
            found["without gradient"] = [n for n, p in parameters.items() if p.requires_grad and p.grad is None]
            for parameter in parameters.values():
                parameter.grad = None
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    return found


def logged(mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    """Records the waits of the metrics' tracker, which the models have filled, at steps with and without logging."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    class Writer:
        def add_scalar(self, name: str, value: Any, iteration: int) -> None:
            float(value)  # as TensorBoard reads it

        def add_image(self, *args: Any, **kwargs: Any) -> None:
            pass

    found = {}
    for step in (1, 2, 5, 10):  # the first is always logged
        with storage_less.Waits(mode, answer) as waits:
            get_moe_metrics_tracker().report(
                1.0, step, Writer(), num_layers=2, total_loss_dict={}, track_names=[], per_layer_logging=False
            )
        found[str(step)] = dict(waits.by)
    return found


def main() -> None:
    """Builds the models and runs the parts on both devices."""
    folder = Path(sys.argv[1])
    storage_less.stand_for_cuda()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_smar.monitoring.config import MonitorConfig
    from megatron_smar.monitoring.tracker import RoutingMetricsTracker
    from megatron_smar.routing.strategies.smar import SmarConfig

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder)
    results: dict[str, Any] = {}
    for name in ("cuda", "meta"):
        storage_less.current = torch.device("cpu")
        models = build_models(folder)
        device = storage_less.current = torch.device(name)
        config = MonitorConfig(4, 2, scalar_interval=5, console_interval=10, metrics=SmarConfig.metrics)
        with FakeTensorMode() as mode:
            MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones((), device=device)  # as Megatron's schedules do
            with storage_less.Waits(mode, answer):
                set_moe_metrics_tracker(tracker := RoutingMetricsTracker(config))
            models = [storage_less.move(model, device) for model in models]
            tracker.watch(model for model in models if isinstance(model, torch.nn.Module))
            results[name] = {
                part: measure(owner, forward, device, mode) for part, owner, forward in parts(models, device, mode)
            }
            results[name]["metrics"] = logged(mode, device)
            results[name]["controls"] = {
                control: measure(None, forward, device, mode) for control, forward in controls.of(models[0], device)
            }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
