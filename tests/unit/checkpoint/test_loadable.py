# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with a pickle that runs a command is refused by name, wherever the pickle is; the command is not run."""

import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.core.dist_checkpointing.strategies.common import load_common
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_smar.checkpoint.loadable import check_loadable
from megatron_smar.checkpoint.metadata import DamagedError, check_objects, read_contents
from megatron_smar.runtime.unpickling import load_object
from tests.unsafe import Command, poison_object

FLAGS = dict(ckpt_step=None, save=None, ckpt_format="torch_dist", ckpt_convert_format=None, pretrained_checkpoint=None)
FLAGS |= dict(non_persistent_ckpt_type=None, non_persistent_global_ckpt_dir=None, load=None, async_save=False)
FLAGS |= dict(save_retain_interval=None, verify_integrity=False, async_strategy="mcore")


def read_metadata(path: str):
    return dcp.FileSystemReader(path).read_metadata()


@pytest.fixture(autouse=True)
def installed(single_rank) -> None:
    """Installs the adaptations of torch and Megatron, as every program does first."""


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    return shutil.copytree(trained["plain"], tmp_path / "checkpoints")


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "was_run"


def test_the_command_of_these_tests_runs_when_it_is_unpickled_normally(mark):
    pickle.loads(pickle.dumps(Command(mark)))
    assert mark.exists()


@pytest.mark.parametrize("flag", ["load", "pretrained_checkpoint", "non_persistent_global_ckpt_dir"])
def test_a_table_of_contents_that_runs_a_command_is_refused_by_name(copied, mark, flag):
    (copied / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read \(it asks for posix\.system") as refusal:
        check_loadable(Namespace(**FLAGS | {flag: str(copied)}))
    assert str(refusal.value).startswith(f"--{flag.replace('_', '-')} {copied} ")
    assert not mark.exists()


def test_a_non_persistent_checkpoint_in_load_that_runs_a_command_is_refused(copied, mark):
    """Megatron prefers non_persistent/ in --load where it is newer."""
    shutil.copytree(copied, copied / "non_persistent")
    (copied / "non_persistent" / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    with pytest.raises(ValueError, match=r"non_persistent.*\.metadata cannot be read"):
        check_loadable(Namespace(**FLAGS | {"load": str(copied)}))
    assert not mark.exists()


def test_megatrons_and_torchs_own_readers_do_not_run_a_table_of_contents(copied, mark):
    folder = copied / "iter_0000002"
    (folder / ".metadata").write_bytes(pickle.dumps(Command(mark)))
    for read in (
        load_tensors_metadata,
        load_common_state_dict,
        lambda path: dcp.FileSystemReader(path).read_metadata(),
    ):
        with pytest.raises((DamagedError, CheckpointException), match=r"\.metadata cannot be read"):
            read(str(folder))
    assert not mark.exists()


def test_no_object_of_a_checkpoint_runs_a_command_in_any_reader(copied, mark):
    """Random states and arguments are objects in the .distcp files, which torch reads with weights_only=False."""
    folder, evil = copied / "iter_0000002", pickle.dumps(Command(mark))
    names = sorted(
        n for n, d in read_contents(folder).state_dict_metadata.items() if isinstance(d, BytesStorageMetadata)
    )
    assert any("common_state" in name for name in names) and any("rng_state" in name for name in names)
    for name in names:
        poison_object(folder, BytesStorageMetadata, evil, name)
        with pytest.raises((DamagedError, CheckpointException)):
            dcp.load({name: None}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    with pytest.raises(DamagedError, match=r"\.distcp does not give .*"):
        check_objects(folder, read_contents(folder))
    with pytest.raises(ValueError, match="does not give the run's arguments"):
        check_loadable(Namespace(**FLAGS | {"load": str(copied)}))
    assert not mark.exists()


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_common_pt_that_a_stranger_put_into_a_checkpoint_is_run(copied, mark, write):
    """Older releases of Megatron wrote this file; every release reads it, and prefers it to what the others hold."""
    folder = copied / "iter_0000002"
    with (folder / "common.pt").open("wb") as file:
        write(Command(mark), file)
    with pytest.raises(ValueError, match=r"common\.pt does not give the run's arguments"):
        check_loadable(Namespace(**FLAGS | {"load": str(copied)}))
    with pytest.raises(pickle.UnpicklingError):
        load_common(folder)
    assert not mark.exists()


def test_a_tensor_that_runs_a_command_is_refused_with_its_file(copied, mark):
    folder = copied / "iter_0000002"
    name = poison_object(folder, dcp.metadata.TensorStorageMetadata, pickle.dumps(Command(mark)), "language_model")
    size = read_contents(folder).state_dict_metadata[name].size
    with pytest.raises(CheckpointException) as failure:
        dcp.load({name: torch.empty(size)}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    ((error, _),) = failure.value.failures.values()
    assert isinstance(error, DamagedError) and ".distcp" in str(error) and str(folder) in str(error)
    assert not mark.exists()


def test_code_in_a_file_of_another_format_is_not_run_however_it_is_loaded(tmp_path, mark):
    """The files of --ckpt-format torch, loaded by any call of torch.load."""
    torch.save({"model": Command(mark)}, tmp_path / "model_optim_rng.pt")
    for options in ({}, {"weights_only": False}):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "model_optim_rng.pt", **options)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(load="x", ckpt_format="torch"), "--ckpt-format torch "),
        (dict(save="x", ckpt_format="torch_dcp"), "--ckpt-format torch_dcp "),
        (dict(save="x", ckpt_convert_format="torch"), "--ckpt-convert-format torch "),
        (dict(save="x", non_persistent_ckpt_type="local"), "--non-persistent-ckpt-type local "),
        (dict(save="x", non_persistent_ckpt_type="global"), "--non-persistent-ckpt-type global "),
        (dict(save="x", async_save=True, async_strategy="nvrx"), "--async-strategy nvrx "),
        (dict(save="x", save_retain_interval=100), "give --keep-last 1 --keep-every 100"),
        (dict(save="x", verify_integrity=True), "--verify-integrity reads each checkpoint again"),
    ],
)
def test_formats_and_saves_that_this_trainer_does_not_vouch_for_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_loadable(Namespace(**FLAGS | changes))


def test_a_folder_in_another_format_is_refused(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="is in another format than torch_dist"):
        check_loadable(Namespace(**FLAGS | {"load": str(tmp_path)}))


def test_checkpoints_that_the_trainer_saved_are_accepted(trained):
    for folder in trained.values():
        check_loadable(Namespace(**FLAGS | {"load": str(folder)}))
        check_objects(folder / "iter_0000002", read_contents(folder / "iter_0000002"))


def test_the_classes_in_an_offloaded_optimizers_state_are_admitted():
    """--optimizer-cpu-offload stores classes in its state, and Megatron compares them on loading."""
    import io

    content = io.BytesIO()
    torch.save({"cpu_optimizer_cls": torch.optim.AdamW}, content)
    assert load_object(content.getvalue())["cpu_optimizer_cls"] is torch.optim.AdamW
