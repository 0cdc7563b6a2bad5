# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of real checkpoints, whole and broken, of one layout and another, of friends and strangers."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.training.checkpointing import get_checkpoint_name

import megatron_smar
from megatron_smar.checkpoint.describe import describe
from megatron_smar.checkpoint.metadata import DamagedError
from tests.distributed.cases import LENGTH, ROWS
from tests.launch import load_weights
from tests.unit.checkpoint.conftest import STEPS


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A checkpoint to break."""
    return shutil.copytree(trained["sharded"], tmp_path / "copy")


def test_the_weights_are_told_whole_and_none_is_left_out(trained):
    told = describe(trained["sharded"])
    weights = load_weights(trained["sharded"] / "iter_0000002")
    assert sum(group.count for group in told.weights) == len(weights)
    assert told.parameters["altogether"] == sum(weight.numel() for weight in weights.values())
    assert told.parameters["altogether"] == sum(told.parameters[part] for part in ("vision", "connector", "language"))
    experts = {name: weight for name, weight in weights.items() if ".experts." in name}
    assert told.parameters["experts"] == sum(weight.numel() for weight in experts.values()) > 0
    by_name = {group.name: group for group in told.weights}
    for name, weight in experts.items():
        assert by_name[name].shape == tuple(weight.shape) and by_name[name].dtype == "float32"
    (numbered,) = [group for group in told.weights if group.name.endswith("layer.*.mlp.fc1.weight")]
    assert (numbered.count, numbered.parameters) == (2, 2 * math.prod(numbered.shape))


def test_what_the_run_was_is_told(trained):
    told = describe(trained["sharded"])
    assert (told.step, told.samples, told.tokens_at_most) == (STEPS, STEPS * ROWS, STEPS * ROWS * LENGTH)
    assert told.stage == "stage 2, visual instruction tuning (frozen: vision)"
    assert told.architecture["num_experts"] == 4 and told.architecture["moe_router_topk"] == 2
    assert told.routing["modality_routing"] == "smar" and told.routing["smar_d_min"] == 3
    assert told.layout["use_distributed_optimizer"] is True and told.layout["world_size"] == 1
    assert told.program["megatron_smar"] == megatron_smar.__version__ and "megatron-core" in told.program
    assert told.is_whole and told.family is None and told.data_states == 0
    assert told.size == sum(file.stat().st_size for file in told.folder.rglob("*"))


def test_an_earlier_checkpoint_can_be_asked_for(trained):
    assert describe(trained["plain"], 1).step == 1
    assert describe(trained["plain"] / "iter_0000001").step == 1
    with pytest.raises(ValueError, match=r"no iter_0000009; there are: iter_0000001, iter_0000002\.$"):
        describe(trained["plain"], 9)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("plain", "adam, for any layout"),
        ("sharded", "adam, of the distributed optimizer (fully_reshardable: for any layout)"),
        ("as it lies", "adam, of the distributed optimizer (dp_reshardable: for any number of replicas)"),
        ("weights", None),
    ],
)
def test_the_optimizers_state_is_told_and_is_no_weight(trained, form, told):
    description = describe(trained[form])
    assert description.optimizer == told
    assert (description.optimizer_bytes > 0) == (told is not None)
    assert not any("optimizer" in group.name for group in description.weights)
    assert description.parameters == describe(trained["plain"]).parameters


def test_json_and_table_hold_the_same(trained):
    told = describe(trained["sharded"])
    content = json.loads(json.dumps(told.as_json()))
    assert content["step"] == STEPS and content["is_whole"] is True and content["folder"] == str(told.folder)
    assert len(content["weights"]) == len(told.weights)
    table = told.table()
    for part in ("stage 2", "smar_d_min 3.0", "num_layers 2", f"{told.parameters['altogether']:,}"):
        assert part in table
    for group in told.weights:
        assert group.name in table and f"{group.parameters:,}" in table


def test_loader_states_and_the_family_beside_a_checkpoint_are_found(copy):
    for rank in range(3):
        name = f"train_dataloader_dprank{rank:03d}.pt"
        file = Path(get_checkpoint_name(str(copy / "dataloader"), 2, False, False, 0, 0, False, 0, basename=name))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (copy / "hf").mkdir()
    config = {"model_type": "internvl", "text_config": {"model_type": "mixtral"}}
    (copy / "hf" / "config.json").write_text(json.dumps(config))
    told = describe(copy)
    assert told.data_states == 3 and told.family == "internvl with mixtral"
    assert describe(copy, 1).data_states == 0


def test_a_file_that_is_cut_off_or_missing_is_named(copy):
    folder = copy / "iter_0000002"
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    told = describe(copy)
    assert told.problems == (f"{file.name} has {len(content) - 100} of {len(content)} bytes",)
    assert not told.is_whole and f"NO: {told.problems[0]}" in told.table()
    file.unlink()
    with pytest.raises(DamagedError, match=f"is damaged: {file.name} is missing"):
        describe(copy)
    (folder / ".metadata").unlink()
    file.write_bytes(content)
    with pytest.raises(ValueError, match="its saving was cut off"):
        describe(copy)


def test_a_table_of_contents_that_is_cut_off_is_damage(copy):
    contents = copy / "iter_0000002" / ".metadata"
    contents.write_bytes(contents.read_bytes()[:-50])
    with pytest.raises(DamagedError, match=r"\.metadata cannot be read"):
        describe(copy)


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.write_text, (self.mark, "unpickled")


def test_code_in_a_strangers_checkpoint_does_not_run(copy, tmp_path):
    mark = tmp_path / "mark"
    (copy / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(DamagedError, match="it asks for"):
        describe(copy)
    shutil.copy(copy.parent / "copy" / "iter_0000001" / ".metadata", copy / "iter_0000002" / ".metadata")
    (copy / "iter_0000002" / "common.pt").write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(DamagedError, match=r"common\.pt does not give the run's arguments"):
        describe(copy)
    assert not mark.exists()


def test_what_is_no_checkpoint_is_told_in_a_sentence(copy, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; give that of a checkpoint"):
        describe(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no checkpoint: it has no latest_checkpointed_iteration\.txt"):
        describe(tmp_path / "empty")
    (copy / "iter_0000007" / "mp_rank_00").mkdir(parents=True)
    (copy / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match="iter_0000007 is in another format than torch_dist"):
        describe(copy)
    (copy / "latest_checkpointed_iteration.txt").write_text("soon")
    with pytest.raises(DamagedError, match="names no step but 'soon'"):
        describe(copy)


def test_the_classes_that_an_offloaded_optimizer_names_do_not_make_a_checkpoint_unreadable(tmp_path):
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from torch.distributed.checkpoint.metadata import Metadata

    from megatron_smar.checkpoint.metadata import DamagedError, read_common_state

    group = {"lr": 1e-3, "cls": torch.optim.AdamW}
    torch.save({"iteration": 3, "optimizer": {"param_groups": [group]}}, tmp_path / COMMON_STATE_FNAME)
    assert read_common_state(tmp_path, Metadata({}))["iteration"] == 3
    torch.save({"iteration": 3, "optimizer": os.system}, tmp_path / COMMON_STATE_FNAME)
    with pytest.raises(DamagedError):
        read_common_state(tmp_path, Metadata({}))
