# SPDX-License-Identifier: Apache-2.0
"""Tests of the environment with Transformer Engine and a GPU: Megatron's own defaults are used."""

from argparse import ArgumentParser
from importlib import util

import pytest

APEX = "fused_weight_gradient_mlp_cuda"


def test_megatron_smar_and_megatron_are_imported_with_transformer_engine():
    import megatron.core.extensions.transformer_engine as extension
    import transformer_engine.pytorch as te

    import megatron_smar
    from megatron_smar import runtime

    assert megatron_smar.__version__ and extension.HAVE_TE
    assert issubclass(extension.TELinear, te.Linear)
    found = runtime.current()
    assert (found.device, found.transformer_engine) == ("cuda", True)
    assert found.fused_weight_gradient == (util.find_spec(APEX) is not None)
    assert "Transformer Engine layers, FusedAdam" in runtime.describe()


def test_every_default_is_megatrons_except_the_few_of_this_project():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_smar.config.flags import add_arguments

    theirs = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    ours = add_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    changed = {
        action.dest: ours.get_default(action.dest)
        for action in theirs._actions
        if ours.get_default(action.dest) != theirs.get_default(action.dest)
    }
    expected = {"dataloader_type": "external", "eval_interval": 1000, "moe_router_dtype": "fp32"}
    expected |= {"dist_ckpt_optim_fully_reshardable": True}
    if util.find_spec(APEX) is None:
        expected |= {"gradient_accumulation_fusion": False}
    assert changed == expected


def test_by_default_a_run_uses_transformer_engine_layers_and_fused_rope(one_rank, tower):
    from tests.te.building import parse

    args = parse("mixtral", tower)
    assert args.transformer_impl == "transformer_engine"
    assert args.apply_rope_fusion and args.bias_swiglu_fusion and args.masked_softmax_fusion
    assert args.distributed_backend == "nccl"


def test_gradient_accumulation_fusion_without_apex_is_refused_in_a_sentence(one_rank, tower):
    from megatron_smar import runtime
    from tests.te.building import parse

    if util.find_spec(APEX) is not None:
        pytest.skip("apex is installed")
    args = parse("mixtral", tower)
    runtime.check_flags(args)
    args.gradient_accumulation_fusion = True
    with pytest.raises(ValueError, match=r"--gradient-accumulation-fusion needs apex's .*not installed"):
        runtime.check_flags(args)
