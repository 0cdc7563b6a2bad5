# SPDX-License-Identifier: Apache-2.0
"""A checkpoint must hold exactly the model's weights: each optional part is tested in both directions."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_smar.checkpoint.fit import CheckpointMismatchError
from megatron_smar.checkpoint.torch_dist import Shard, write_checkpoint
from megatron_smar.checkpoint.weights_fit import check_weights
from megatron_smar.conversion.empty_model import build_empty, parse, sharded_parts
from tests.launch import SMALL_MODEL
from tests.models import save_tower

VOCABULARY = 64
LATENT = "--multi-latent-attention --rope-type rope --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4"
# For each part: flags that add it, the flag of SMALL_MODEL that they replace, and the weight and flag in the message.
PARTS = {
    "norms of queries and keys": ("--qk-layernorm", "", "_layernorm", "--qk-layernorm"),
    "an output bias": ("--output-bias", "", "output_layer.bias", "--output-bias"),
    "biases of queries and keys": ("--add-qkv-bias", "", "linear_qkv.bias", "--add-qkv-bias"),
    "a bias of the choice of experts": (
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-dtype fp32",
        "",
        "router.expert_bias",
        "--moe-router-enable-expert-bias",
    ),
    "shared experts": ("--moe-shared-expert-intermediate-size 32", "", "shared_experts", "--moe-shared-expert-inter"),
    "biases of linear layers": ("", "--disable-bias-linear", ".bias", "--disable-bias-linear"),
    "biases of norms": ("--normalization LayerNorm", "", "bias", "--normalization"),
    "an untied output layer": ("", "TIED", "output_layer.weight", "--untie-embeddings-and-output-weights"),
    "a norm in the connector": ("--connector internvl", "", "connector.", "--connector"),
    "one more layer": ("--num-layers 3", "", "layers", ""),
    "experts in every layer": ("", "SOME", "", "--moe-layer-freq"),
}


def model_and_args(tower: str, more: str, without: str = "") -> tuple[torch.nn.Module, Namespace]:
    flags = [flag for flag in SMALL_MODEL if flag != without]
    if without == "TIED":
        flags.remove("--untie-embeddings-and-output-weights")
    if without == "SOME":
        more += " --moe-layer-freq ([0,1]*1)"
    args = parse([*flags, *more.split(), "--vision-model", tower], VOCABULARY)
    args.allow_model_change, args.ckpt_step, args.pretrained_checkpoint = [], None, None
    return build_empty(args), args


def save(model: torch.nn.Module, args: Namespace, folder: Path, value: float = 0.0) -> Path:
    """Writes the model's checkpoint with the same value everywhere."""
    tensors, objects = sharded_parts(model)
    shards = [
        Shard(
            part.key,
            tuple(part.global_offset),
            (1,) * part.prepend_axis_num + tuple(part.local_shape),
            tuple(part.global_shape),
            part.dtype,
            lambda part=part: torch.full(tuple(part.local_shape), value).to(part.dtype),
        )
        for parts in tensors.values()
        for part in parts
    ]
    write_checkpoint(folder, shards, objects, args, lambda _: None)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> str:
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def plain(tower, single_rank, tmp_path_factory):
    model, args = model_and_args(tower, "")
    return model, args, save(model, args, tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_only_model_or_checkpoint_has_is_refused_with_weight_and_flag(plain, tower, tmp_path, part):
    more, without, weight, flag = PARTS[part]
    model, args, folder = plain
    other, other_args = model_and_args(tower, more, without)
    other_folder = save(other, other_args, tmp_path / "checkpoint")
    for loading, given, stored in ((model, args, other_folder), (other, other_args, folder)):
        given.load = str(stored)
        with pytest.raises(CheckpointMismatchError, match="holds another model than the flags describe") as refusal:
            check_weights(loading, given)
        assert weight in str(refusal.value) and flag in str(refusal.value), str(refusal.value)
    other_args.load = str(other_folder)
    check_weights(other, other_args)


def test_modality_biases_are_dropped_only_if_they_are_zero_or_a_flag_allows_it(plain, tower, tmp_path):
    model, args, folder = plain
    without, given = model_and_args(tower, "--no-modality-router-bias")
    given.load = str(folder)
    check_weights(without, given)  # the biases are zero, as in an import: nothing is lost
    given.load = str(save(model, args, tmp_path / "trained", value=0.5))
    with pytest.raises(CheckpointMismatchError, match=r"modality_bias.*no place.*--no-modality-router-bias"):
        check_weights(without, given)
    given.allow_model_change = ["no-modality-router-bias"]
    check_weights(without, given)
    args.load = str(save(without, given, tmp_path / "without"))
    with pytest.raises(
        CheckpointMismatchError, match=r"modality_bias.* is missing from the checkpoint.*--no-modality-router-bias"
    ):
        check_weights(model, args)


def test_another_padding_of_the_vocabulary_is_accepted(plain, tower):
    _, args, folder = plain
    args.padded_vocab_size = VOCABULARY + 32
    args.load = str(folder)
    check_weights(build_empty(args), args)
    args.padded_vocab_size = VOCABULARY


@pytest.mark.parametrize("strategy", ["modality_gates", "moiie"])
def test_a_new_run_starts_a_gate_per_modality_from_a_checkpoint_with_one_and_a_resumed_run_is_refused(
    plain, tower, tmp_path, capsys, strategy
):
    _, _, folder = plain
    model, args = model_and_args(tower, f"--modality-routing {strategy}")
    args.load = str(folder)
    router = model.language_model.decoder.layers[1].mlp.router
    for start in ("finetune", "skip_train"):
        setattr(args, start, True)
        check_weights(model, args)
        assert router._lacking == {"gates.1.weight"}
        assert f"--load {folder} has no weights of --modality-routing {strategy}" in capsys.readouterr().out
        setattr(args, start, False)
    release = save(build_empty(args), args, tmp_path / "gates")
    (folder / "release").rename(folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    try:
        with pytest.raises(
            CheckpointMismatchError,
            match=r"gates.1.weight is missing from the checkpoint \(--modality-routing; a resumed",
        ):
            check_weights(build_empty(args), args)
    finally:
        (folder / "iter_0000003").rename(folder / "release")
        (folder / "latest_checkpointed_iteration.txt").write_text("release")
    args.load = str(release)
    check_weights(model, args)
    assert router._lacking == frozenset(), "they are in the checkpoint"
    assert "has no weights of" not in capsys.readouterr().out


def test_a_gate_per_modality_is_not_dropped_unless_a_flag_allows_it(plain, tower, tmp_path):
    model, args, _ = plain
    with_gates, given = model_and_args(tower, "--modality-routing modality_gates")
    args.load = str(save(with_gates, given, tmp_path / "gates"))
    with pytest.raises(CheckpointMismatchError, match=r"gates.1.weight.*no place \(--modality-routing\)"):
        check_weights(model, args)
    args.allow_model_change = ["modality-routing"]
    check_weights(model, args)
    args.allow_model_change = []


def test_statistics_that_only_training_needs_start_anew_or_are_left_out(plain, tower, tmp_path, capsys):
    model, args, folder = plain
    flags = "--modality-routing smoes --smoes-bins 2 --smoes-scores gaussian"
    with_statistics, given = model_and_args(tower, flags)
    given.load, given.finetune = str(folder), True
    check_weights(with_statistics, given)
    assert f"--load {folder} has no weights of --modality-routing smoes" in capsys.readouterr().out
    given.finetune = False
    args.load = str(save(build_empty(given), given, tmp_path / "smoes"))
    check_weights(model, args)
