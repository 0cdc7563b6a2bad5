# SPDX-License-Identifier: Apache-2.0
"""The model that `smar_overhead.py` trains, and the settings of its routers."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

IMAGE_TOKEN, IMAGE_SIZE, PATCH = 5, 64, 8
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH // 2) ** 2
BASE, STRATEGY, BALANCE = SETTINGS = ("none", "strategy", "global_aux_loss")


@dataclass(frozen=True)
class Shape:
    """A model and its batch.

    Attributes:
        micro_batch_size: Samples per rank and step.
        triples: Number of timed triples of steps, if they take no more than LIMIT_SECONDS.
        quick_triples: The same with --quick.
    """

    hidden: int
    ffn: int
    layers: int
    seq_length: int
    micro_batch_size: int
    vocabulary: int
    triples: int
    quick_triples: int
    heads: int = 8
    groups: int = 4
    experts: int = 8
    top_k: int = 2


SHAPES = {
    "demo": Shape(128, 320, 4, 128, 8, 2048, triples=80, quick_triples=6, heads=4, groups=2),
    # A layer of Mixtral 8x7B at an eighth of its width. The vocabulary is small, so that the layer dominates the step.
    "mixtral": Shape(512, 1792, 1, 512, 2, 512, triples=60, quick_triples=4),
}


def flags(shape: Shape, ranks: int, vision_path: str, bf16: bool, strategy: str) -> list[str]:
    """Returns Megatron's flags for the model; the tiny learning rate keeps routing the same in all settings."""
    groups = f"--group-query-attention --num-query-groups {shape.groups}" if shape.groups < shape.heads else ""
    return f"""
        --vision-model {vision_path} --image-size {IMAGE_SIZE} --connector mlp2x_gelu --modality-routing {strategy}
        --num-layers {shape.layers} --hidden-size {shape.hidden} --ffn-hidden-size {shape.ffn}
        --num-attention-heads {shape.heads} {groups}
        --num-experts {shape.experts} --moe-router-topk {shape.top_k} --expert-model-parallel-size {ranks}
        --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.01
        --moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm --disable-bias-linear
        --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
        --seq-length {shape.seq_length} --max-position-embeddings {shape.seq_length}
        --micro-batch-size {shape.micro_batch_size} --global-batch-size {shape.micro_batch_size * ranks}
        --train-iters 100000 --lr 1e-8 --clip-grad 1.0 --weight-decay 0 --use-distributed-optimizer
        --tokenizer-type NullTokenizer --vocab-size {shape.vocabulary} --make-vocab-size-divisible-by 1
        --no-check-for-nan-in-loss-and-grad {"--bf16" if bf16 else ""}
    """.split()


def save_vision_model(folder: str) -> None:
    """Saves a small vision encoder, which is frozen and the same in every setting."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = InternVLVisionConfig(**sizes, image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH, PATCH])
    InternVLVisionModel(config).save_pretrained(folder)


def make_batch(shape: Shape, seed: int) -> Any:
    """Returns one micro-batch, different on each rank: each sequence is an image followed by random text."""
    import torch

    from megatron_smar.data.batch import VisionLanguageBatch

    generator = torch.Generator().manual_seed(seed)
    size = (shape.micro_batch_size, shape.seq_length)
    ids = torch.randint(6, shape.vocabulary, size, generator=generator)
    ids[:, 1 : 1 + TOKENS_PER_TILE] = IMAGE_TOKEN
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return VisionLanguageBatch(
        __key__=[str(row) for row in range(shape.micro_batch_size)],
        __restore_key__=(),
        input_ids=ids,
        labels=labels,
        loss_mask=(labels != IMAGE_TOKEN).float(),
        padding_mask=torch.zeros(size, dtype=torch.bool),
        pixel_values=torch.randn(shape.micro_batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
    )


def megatron_routing(router: Any, logits: Any, padding_mask: Any) -> Any:
    """Runs Megatron's router on this project's model, with the padding that the modality mask [s, b, M] implies."""
    from megatron.core.transformer.moe.router import TopKRouter

    return TopKRouter.routing(router, logits, padding_mask=~padding_mask.any(dim=-1))


class Training:
    """A model with its optimizer on this rank, trained on one batch in a setting that can be changed between steps.

    Attributes:
        step: Runs one training step.
        routers: Routers of all MoE layers.
        models: The model's chunks.
        chunks: The same with Megatron's gradient buffers around them.
        optimizer: Megatron's optimizer.

    Args:
        shape: The model's sizes.
        ranks: Processes; expert-parallel size.
        vision_path: Folder of the vision encoder.
        bf16: Whether the model is in bfloat16.
        strategy: A value of --modality-routing.
        extra: Further flags.
        read: Returns the next micro-batch; None for the same one in each step.
        batches: Micro-batches that every model chunk reads in turn, instead of `read`.
        without: Switches of the usual flags that are left out.
    """

    def __init__(
        self,
        shape: Shape,
        ranks: int,
        vision_path: str,
        bf16: bool,
        strategy: str = "smar",
        extra: Sequence[str] = (),
        read: Callable[[], Any] | None = None,
        batches: Sequence[Any] = (),
        without: Sequence[str] = (),
    ) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.utils import get_model_config, unwrap_model
        from megatron.training import get_args
        from megatron.training.training import train_step

        from megatron_smar.routing.router import ModalityAwareRouter
        from megatron_smar.routing.strategies.none import NoneConfig
        from megatron_smar.training.providers import make_forward_step
        from megatron_smar.training.setup import start

        usual = [word for word in flags(shape, ranks, vision_path, bf16, strategy) if word not in without]
        model, optimizer, scheduler = start([*usual, *extra])
        self.chunks, self.optimizer = model, optimizer
        get_args().curr_iteration = 0
        config = get_model_config(model[0])
        config.grad_scale_func = optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if read is None:
            read = itertools.repeat(make_batch(shape, seed=2 + get_args().rank)).__next__
        iterator: Any = RerunDataIterator(iter(read, None))
        if batches:
            iterators = [RerunDataIterator(itertools.cycle(batches)) for _ in model]
            iterator = iterators if len(model) > 1 else iterators[0]
        forward_step = make_forward_step([IMAGE_TOKEN], TOKENS_PER_TILE)
        arguments = (forward_step, iterator, model, optimizer, scheduler, config, get_forward_backward_func())
        for chunk in model:
            chunk.train()
        self._train: Callable[[], Any] = functools.partial(train_step, *arguments, iteration=0)
        modules = [module for chunk in model for module in chunk.modules()]
        self.routers: list[Any] = [module for module in modules if isinstance(module, ModalityAwareRouter)]
        self.models: list[Any] = unwrap_model(model)
        self._routing = self.models[0].modality_routing
        self._plain = replace(self._routing, strategy=NoneConfig())

    def step(self) -> None:
        """Runs one training step; each has its number, so that a strategy updates its state."""
        from megatron.training import get_args

        self._train()
        get_args().curr_iteration += 1

    def use(self, setting: str) -> None:
        """Switches the live routers to one of SETTINGS; see the program's docstring."""
        from megatron.core.transformer.moe.router import TopKRouter

        for model in self.models:  # a strategy may need more than the modality mask: samples, scores of the attention
            model.modality_routing = self._routing if setting == STRATEGY else self._plain
        own = {"forward": TopKRouter.forward, "gating": TopKRouter.gating, "routing": megatron_routing}
        for router in self.routers:
            for name, function in own.items():
                router.__dict__.pop(name, None)
                if setting != STRATEGY:
                    setattr(router, name, functools.partial(function, router))
            router.routing_type = BALANCE if setting == BALANCE else "none"

    def seconds(self, setting: str) -> float:
        """Returns the wall-clock time of one step on this rank; all ranks begin together."""
        import torch

        self.use(setting)
        torch.distributed.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin


def forget_megatron() -> None:
    """Resets Megatron's global state, so that this process can initialize another model."""
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import unset_global_variables

    unset_global_variables()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()
