# SPDX-License-Identifier: Apache-2.0
"""Upcycles dense models to mixtures of experts as MoE-LLaVA does: each expert starts as the dense feed-forward layer.

The weights of the chosen experts add up to one. So at the start the mixture computes what the dense model computes,
whatever the new router chooses (Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055; MoE-LLaVA, arXiv 2401.15947).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_smar.checkpoint.folders import ConversionError
from megatron_smar.conversion import composite
from megatron_smar.conversion.architectures import Flags
from megatron_smar.conversion.sources import Source
from megatron_smar.conversion.weights import Weight, generator_of

FEED_FORWARD = re.compile(r"(.*decoder\.layers\.(\d+)\.mlp\.)(linear_fc[12]\.(?:weight|bias))")


@dataclass(frozen=True)
class UpcyclingConfig:
    """How a dense model becomes a mixture of experts.

    Attributes:
        num_experts: Number of experts in each MoE layer.
        topk: Number of experts that each token is routed to.
        every: Every n-th layer, from the first, becomes an MoE layer; MoE-LLaVA: 2.
        router_init_std: Standard deviation of the new routers' weights.
        noise: Standard deviation of the noise added to each expert's weights, relative to the weight's own; with noise
            the mixture does not start exactly as the dense model.
        seed: Seed of the routers' and the noise's generators.
    """

    num_experts: int = 4
    topk: int = 2
    every: int = 2
    router_init_std: float = 0.02
    noise: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ValueError(f"--num-experts is {self.num_experts}; a mixture has 2 or more (MoE-LLaVA: 4).")
        if not 2 <= self.topk <= self.num_experts:  # the weight of a single one is 1 and teaches the router nothing
            raise ValueError(f"--moe-router-topk is {self.topk}; give 2 to --num-experts {self.num_experts}.")
        if self.every < 1:
            raise ValueError(f"--every is {self.every}; give 1 for every layer, 2 for every second (MoE-LLaVA), ...")
        if self.router_init_std < 0 or self.noise < 0:
            raise ValueError(
                f"--router-init-std {self.router_init_std} and --noise {self.noise} are standard deviations: 0 or more."
            )

    def layers(self, number: int) -> list[int]:
        """Returns which of a model's layers become MoE layers, given their number."""
        return list(range(0, number, self.every))


def upcycled(source: Source, upcycling: UpcyclingConfig) -> Source:
    """Returns the mixture of experts that a dense model becomes.

    Raises:
        ConversionError: The model has experts already.
    """
    text = source.config.text_config
    if source.flags.get("num-experts"):
        raise ConversionError(f"this {text.model_type} model has experts already; upcycling takes a dense model.")
    chosen = set(upcycling.layers(text.num_hidden_layers))
    table: list[Weight] = []
    for row in source.table:
        part = FEED_FORWARD.fullmatch(row.megatron)
        if part is None or int(part[2]) not in chosen:
            table.append(row)
            continue
        experts = (f"{part[1]}experts.local_experts.{n}.{part[3]}" for n in range(upcycling.num_experts))
        table += [_expert(row, name, upcycling) for name in experts]
        if part[3] == "linear_fc1.bias":
            table.append(Weight(f"{part[1]}router.bias", make=lambda shape, dtype: torch.zeros(shape, dtype=dtype)))
        if part[3] == "linear_fc1.weight":
            router = f"{part[1]}router.weight"
            table.append(Weight(router, make=partial(new_router, router, upcycling)))
    table += composite.modality_biases(table, stored=False)
    mixture = mixture_config(text, upcycling)
    # If transformers has no class for the mixture, hf/ keeps the dense config: for tokenizer, tower and `verify`.
    config = source.config if mixture is None else composite.with_text(source.config, mixture)
    flags = mixture_flags(source.flags, upcycling) if mixture is None else composite.flags(config)
    return replace(source, config=config, table=table, flags=source.flags | flags)


def mixture_flags(dense: Flags, upcycling: UpcyclingConfig) -> Flags:
    """Returns the flags that the mixture has in addition to the dense model's."""
    return {
        "num-experts": upcycling.num_experts,
        "moe-ffn-hidden-size": dense["ffn-hidden-size"],
        "moe-layer-freq": upcycling.every,
        "moe-router-topk": upcycling.topk,
        "moe-router-load-balancing-type": "none",
        "moe-token-dispatcher-type": "alltoall",
    }


def mixture_config(dense: PretrainedConfig, upcycling: UpcyclingConfig) -> PretrainedConfig | None:
    """Returns the mixture's config, of a transformers class that computes it; None if there is no such class."""
    fields = dense.to_dict()
    layers = upcycling.layers(dense.num_hidden_layers)
    if dense.model_type in ("llama", "mistral") and len(layers) == dense.num_hidden_layers:
        experts = {"num_local_experts": upcycling.num_experts, "num_experts_per_tok": upcycling.topk}
        return MixtralConfig(**_common(fields, MixtralConfig) | experts)
    if dense.model_type == "qwen3":
        mixture: dict[str, Any] = {
            "num_experts": upcycling.num_experts,
            "num_experts_per_tok": upcycling.topk,
            "moe_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [n for n in range(dense.num_hidden_layers) if n not in layers],
        }
        return Qwen3MoeConfig(**_common(fields, Qwen3MoeConfig) | mixture)
    return None


def _common(fields: dict[str, Any], kind: type[PretrainedConfig]) -> dict[str, Any]:
    known = {*kind().to_dict(), "head_dim"}  # some classes write head_dim only if it is given
    left_out = ("model_type", "architectures", "transformers_version")
    return {name: value for name, value in fields.items() if name in known and name not in left_out}


def new_router(name: str, upcycling: UpcyclingConfig, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Initializes a router's weights [E, h], normally distributed; they depend on name and seed only."""
    return (torch.randn(shape, generator=generator_of(name, upcycling.seed)) * upcycling.router_init_std).to(dtype)


def _expert(row: Weight, name: str, upcycling: UpcyclingConfig) -> Weight:
    change = partial(with_noise, name, upcycling) if upcycling.noise and name.endswith("weight") else None
    return replace(row, megatron=name, change=change)


def with_noise(name: str, upcycling: UpcyclingConfig, rows: Tensor, start: int) -> Tensor:
    """Adds noise to rows of an expert's weight that begin at row `start`; each expert and start has its own noise."""
    noise = torch.randn(rows.shape, generator=generator_of(f"{name}/{start}", upcycling.seed))
    return (rows.float() + noise * rows.float().std() * upcycling.noise).to(rows.dtype)
