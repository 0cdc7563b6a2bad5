# SPDX-License-Identifier: Apache-2.0
"""Tables of contents of checkpoints that were written to do something else."""

import io
import pathlib
import pickle

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_smar.runtime.unpickling import DamagedError, load_contents


def table(name: str) -> bytes:
    return pickle.dumps(Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo(name, 0, 1)}), protocol=2)


def change(kind: type, attribute: str, value: bytes) -> bytes:
    """Returns a pickle that sets a class's attribute, by the state of an object with slots."""
    module, name = kind.__module__.split("._local")[0].encode(), kind.__name__.encode()
    changed = b"c" + module + b"\n" + name + b"\n" + b"N}V" + attribute.encode() + b"\n" + value + b"s\x86b0"
    return b"\x80\x02" + changed + table("a.distcp")[2:]


def test_a_pickle_changes_a_class_of_this_process():
    """With another Path.parent, what a program writes next to a file would be written elsewhere."""
    with pytest.raises(DamagedError, match=r"it changes PosixPath\.parent"):
        load_contents(io.BytesIO(change(pathlib.PosixPath, "parent", b"V/elsewhere\n")), "x/.metadata")
    assert pathlib.PosixPath("/a/b").parent == pathlib.PosixPath("/a")
    with pytest.raises(DamagedError, match=r"it changes Metadata\.planner_data"):
        load_contents(io.BytesIO(change(Metadata, "planner_data", b"}")), "x/.metadata")
    assert load_contents(io.BytesIO(table("a.distcp")), "x").storage_data


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/__0_0.distcp", "a/../../b"])
def test_a_table_of_contents_names_a_file_outside_the_checkpoint(name):
    with pytest.raises(DamagedError, match=r"^x/\.metadata names the file .*, which is not in its folder"):
        load_contents(io.BytesIO(table(name)), "x/.metadata")
