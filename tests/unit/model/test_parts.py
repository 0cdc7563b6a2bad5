# SPDX-License-Identifier: Apache-2.0
"""Tests that `--freeze` freezes the named parts and that all other parts are still trained."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from tests.launch import SMALL_MODEL
from tests.models import build_hf_model, build_model, prepare

IMAGE, SIDE, TOKENS = 5, 32, 4
ALL_BUT_EXPERTS = ("vision", "connector", "embeddings", "attention", "norms", "dense")
MIXED = {"num_layers": 3, "moe_layer_freq": [0, 1, 1]}
SHARED = {**MIXED, "moe_shared_expert_intermediate_size": 32, "qk_layernorm": True, "add_bias_linear": False}


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vision")
    build_hf_model(image_token_id=IMAGE).model.vision_tower.save_pretrained(folder)
    return str(folder)


def gradients(model, images: int = 1) -> dict[str, torch.Tensor | None]:
    """Returns the gradients of the language model's loss on a batch of one sample, by parameter."""
    ids = torch.randint(6, 128, (1, 16), generator=torch.Generator().manual_seed(1))
    if images:
        ids[0, 3 : 3 + TOKENS] = IMAGE
    pixels = torch.ones(images, 3, SIDE, SIDE)
    batch = prepare(ids, torch.zeros_like(ids, dtype=torch.bool), pixels, IMAGE)
    model(**batch, labels=torch.full_like(ids, 9)).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "mask_token" not in name}


def test_each_parameter_belongs_to_the_part_of_its_module(single_rank, vision):
    from megatron_smar.model.parts import part_of

    model = build_model(vision, connector="internvl", **SHARED)
    held: dict[str, str] = {}
    for name, module in model.named_modules():
        kinds = {"vision_model": "vision", "connector": "connector"}
        kinds |= {"language_model.embedding": "embeddings", "language_model.output_layer": "embeddings"}
        last = name.rpartition(".")[2]
        part = kinds.get(name) or {"self_attention": "attention", "experts": "experts"}.get(last)
        part = part or {"router": "router", "shared_experts": "experts"}.get(last)
        if name == "language_model.decoder.layers.0.mlp":
            part = "dense"
        if "layernorm" in last and name.startswith("language_model."):
            part = "norms"
        if part and not name.startswith(("vision_model.", "connector.")):  # outer modules come before inner ones
            held |= {f"{name}.{parameter}": part for parameter, _ in module.named_parameters()}
    assert {name: part_of(name) for name, _ in model.named_parameters()} == held
    assert Counter(held.values()).keys() == {*ALL_BUT_EXPERTS, "experts", "router"}


def test_transformer_engines_fused_norms_are_norms_and_unknown_parameters_are_refused():
    from megatron_smar.model.parts import part_of

    layer = "language_model.decoder.layers.0"
    assert part_of(f"{layer}.self_attention.linear_qkv.layer_norm_weight") == "norms"
    assert part_of(f"{layer}.self_attention.linear_qkv.weight") == "attention"
    assert part_of(f"{layer}.mlp.linear_fc1.layer_norm_weight") == "norms"
    assert part_of(f"{layer}.mlp.experts.linear_fc1.weight7") == "experts"
    with pytest.raises(ValueError, match="weight belongs to no part"):
        part_of("language_model.adapter.weight")


@pytest.mark.parametrize("images", [0, 1], ids=["text only", "with image"])
@pytest.mark.parametrize("part", [*ALL_BUT_EXPERTS, "experts", "router", "all but experts and router"])
def test_a_frozen_part_gets_no_gradient_and_every_other_does(single_rank, vision, part, images):
    from megatron_smar.model.parts import part_of

    freeze = frozenset(ALL_BUT_EXPERTS if part.startswith("all") else ["vision", part])
    model = build_model(vision, routing={"strategy": "smar"}, freeze=freeze, **SHARED).train()
    for name, gradient in gradients(model, images).items():
        frozen = part_of(name) in freeze
        assert (gradient is None) == frozen, f"{name} {'has a gradient' if frozen else 'has no gradient'}"


def test_recomputation_after_frozen_embeddings_gives_the_same_gradients(single_rank, vision):
    """A recomputed block whose input requires no gradient computes none for its own parameters either."""
    torch.manual_seed(3)
    options = {"routing": {"strategy": "smar"}, "freeze": frozenset(ALL_BUT_EXPERTS), **MIXED}
    plain = build_model(vision, **options).train()
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = build_model(vision, **options, **recompute).train()
    recomputed.load_state_dict(plain.state_dict())
    expected = gradients(plain)
    for name, gradient in gradients(recomputed).items():
        assert (gradient is None) == (expected[name] is None), f"{name} lost its gradient"
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_frozen_router_keeps_its_expert_bias(single_rank, vision):
    """Megatron updates this bias after each step from the experts' load, without a gradient."""
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    group = torch.distributed.group.WORLD
    moved = {}
    for freeze in (("vision",), ("vision", "language")):
        balance = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
        model = build_model(vision, freeze=frozenset(freeze), **balance).train()
        gradients(model)
        _update_router_expert_bias([model], model.config, tp_dp_cp_group=group)
        moved[freeze] = any(
            float(layer.mlp.router.expert_bias.abs().max()) for layer in model.language_model.decoder.layers
        )
    assert moved == {("vision",): True, ("vision", "language"): False}


NO_DENSE = ("vision", "connector", "embeddings", "attention", "norms", "experts", "router")


@pytest.mark.parametrize(
    ("freeze", "model", "trains"),
    [
        (ALL_BUT_EXPERTS, [], True),
        (ALL_BUT_EXPERTS, ["--num-experts", "0"], False),
        (NO_DENSE, [], False),
        (NO_DENSE, ["--moe-layer-freq", "[0,1]"], True),
        (("vision", "connector", "language"), [], False),
    ],
    ids=["experts of a mixture", "experts of a dense model", "no dense layers", "dense layers", "all"],
)
def test_freezing_every_part_of_a_model_is_refused(monkeypatch, freeze, model, trains):
    from megatron_smar import runtime

    runtime.install()
    from megatron.training.arguments import parse_args

    from megatron_smar.config.checks import check_shape
    from megatron_smar.config.flags import add_arguments

    monkeypatch.setattr("sys.argv", ["pretrain_vlm.py", *SMALL_MODEL, *model, "--freeze", *freeze])
    args = parse_args(add_arguments)
    with nullcontext() if trains else pytest.raises(ValueError, match=f"--freeze {' '.join(freeze)} leaves nothing"):
        check_shape(args)
