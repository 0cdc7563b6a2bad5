# SPDX-License-Identifier: Apache-2.0
"""What `inspect` shows of real checkpoints: complete and damaged ones, of several layouts, trusted and untrusted."""

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
from tests.distributed.batches import LENGTH, ROWS
from tests.launch import load_weights
from tests.unit.conftest import STEPS


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """Returns a copy of a checkpoint, to be damaged."""
    return shutil.copytree(trained["sharded"], tmp_path / "copy")


def test_all_weights_are_described_with_their_unsharded_shapes(trained):
    found = describe(trained["sharded"])
    weights = load_weights(trained["sharded"] / "iter_0000002")
    assert sum(group.count for group in found.weights) == len(weights)
    assert found.parameters["altogether"] == sum(weight.numel() for weight in weights.values())
    parts = ("vision", "connector", "language")
    assert found.parameters["altogether"] == sum(found.parameters[part] for part in parts)
    experts = {name: weight for name, weight in weights.items() if ".experts." in name}
    assert found.parameters["experts"] == sum(weight.numel() for weight in experts.values()) > 0
    by_name = {group.name: group for group in found.weights}
    for name, weight in experts.items():
        assert by_name[name].shape == tuple(weight.shape) and by_name[name].dtype == "float32"
    (numbered,) = [group for group in found.weights if group.name.endswith("layer.*.mlp.fc1.weight")]
    assert (numbered.count, numbered.parameters) == (2, 2 * math.prod(numbered.shape))


def test_the_run_that_saved_a_checkpoint_is_described(trained):
    found = describe(trained["sharded"])
    assert (found.step, found.samples, found.tokens_at_most) == (STEPS, STEPS * ROWS, STEPS * ROWS * LENGTH)
    assert found.stage == "stage 2, visual instruction tuning (frozen: vision)"
    assert found.architecture["num_experts"] == 4 and found.architecture["moe_router_topk"] == 2
    assert found.routing["modality_routing"] == "smar" and found.routing["smar_d_min"] == 3
    assert found.layout["use_distributed_optimizer"] is True and found.layout["world_size"] == 1
    assert found.program["megatron_smar"] == megatron_smar.__version__ and "megatron-core" in found.program
    assert found.is_whole and found.family is None and found.data_states == 0
    assert found.size == sum(file.stat().st_size for file in found.folder.rglob("*"))


def test_an_earlier_checkpoint_can_be_described(trained):
    assert describe(trained["plain"], 1).step == 1
    assert describe(trained["plain"] / "iter_0000001").step == 1
    with pytest.raises(ValueError, match=r"no iter_0000009; there are: iter_0000001, iter_0000002\.$"):
        describe(trained["plain"], 9)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("plain", "adam, for any layout"),
        ("sharded", "adam, of the distributed optimizer (fully_reshardable: for any layout)"),
        ("as stored", "adam, of the distributed optimizer (dp_reshardable: for any number of replicas)"),
        ("weights", None),
    ],
)
def test_the_optimizers_state_is_described_and_not_counted_as_weights(trained, form, expected):
    description = describe(trained[form])
    assert description.optimizer == expected
    assert (description.optimizer_bytes > 0) == (expected is not None)
    assert not any("optimizer" in group.name for group in description.weights)
    assert description.parameters == describe(trained["plain"]).parameters


def test_json_and_table_hold_the_same(trained):
    found = describe(trained["sharded"])
    content = json.loads(json.dumps(found.as_json()))
    assert content["step"] == STEPS and content["is_whole"] is True and content["folder"] == str(found.folder)
    assert len(content["weights"]) == len(found.weights)
    table = found.table()
    for part in ("stage 2", "smar_d_min 3.0", "num_layers 2", f"{found.parameters['altogether']:,}"):
        assert part in table
    for group in found.weights:
        assert group.name in table and f"{group.parameters:,}" in table


def test_loader_states_and_the_model_type_next_to_a_checkpoint_are_found(copy):
    for rank in range(3):
        name = f"train_dataloader_dprank{rank:03d}.pt"
        file = Path(get_checkpoint_name(str(copy / "dataloader"), 2, False, False, 0, 0, False, 0, basename=name))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (copy / "hf").mkdir()
    config = {"model_type": "internvl", "text_config": {"model_type": "mixtral"}}
    (copy / "hf" / "config.json").write_text(json.dumps(config))
    found = describe(copy)
    assert found.data_states == 3 and found.family == "internvl with mixtral"
    assert describe(copy, 1).data_states == 0


def test_a_file_that_is_truncated_or_missing_is_named(copy):
    folder = copy / "iter_0000002"
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    found = describe(copy)
    assert found.problems == (f"{file.name} has {len(content) - 100} of {len(content)} bytes",)
    assert not found.is_whole and f"NO: {found.problems[0]}" in found.table()
    file.unlink()
    with pytest.raises(DamagedError, match=f"is damaged: {file.name} is missing"):
        describe(copy)
    (folder / ".metadata").unlink()
    file.write_bytes(content)
    with pytest.raises(ValueError, match="its saving was cut off"):
        describe(copy)


def test_a_truncated_table_of_contents_is_reported_as_damage(copy):
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


def test_code_in_an_untrusted_checkpoint_does_not_run(copy, tmp_path):
    mark = tmp_path / "mark"
    (copy / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(DamagedError, match="it asks for"):
        describe(copy)
    shutil.copy(copy.parent / "copy" / "iter_0000001" / ".metadata", copy / "iter_0000002" / ".metadata")
    (copy / "iter_0000002" / "common.pt").write_bytes(pickle.dumps(Intruder(mark)))
    with pytest.raises(DamagedError, match=r"common\.pt does not give the run's arguments"):
        describe(copy)
    assert not mark.exists()


def test_what_is_not_a_checkpoint_is_refused_in_one_sentence(copy, tmp_path):
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


def test_a_checkpoint_with_the_classes_of_an_offloaded_optimizer_can_be_read(tmp_path):
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from torch.distributed.checkpoint.metadata import Metadata

    from megatron_smar.checkpoint.metadata import DamagedError, read_common_state

    group = {"lr": 1e-3, "cls": torch.optim.AdamW}
    torch.save({"iteration": 3, "optimizer": {"param_groups": [group]}}, tmp_path / COMMON_STATE_FNAME)
    assert read_common_state(tmp_path, Metadata({}))["iteration"] == 3
    torch.save({"iteration": 3, "optimizer": os.system}, tmp_path / COMMON_STATE_FNAME)
    with pytest.raises(DamagedError):
        read_common_state(tmp_path, Metadata({}))
