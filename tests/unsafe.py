# SPDX-License-Identifier: Apache-2.0
"""Files that run a command when they are unpickled."""

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any


class Command:
    """Runs a command of the shell when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def poison_object(folder: Path, kind: type, content: bytes, begins: str = "") -> str:
    """Puts other content into the first object, or tensor, of a checkpoint, with a manifest that agrees; its name."""
    from megatron_smar.checkpoint.metadata import read_contents
    from megatron_smar.reliability.manifest import NAME, Places, collect

    contents = copy.deepcopy(read_contents(folder))
    found = [i for i in contents.storage_data if isinstance(contents.state_dict_metadata[i.fqn], kind)]
    index = min((i for i in found if i.fqn.startswith(begins)), key=lambda i: i.fqn)
    place = contents.storage_data[index]
    with (folder / place.relative_path).open("ab") as file:
        place.offset, place.length = file.tell(), len(content)
        file.write(content)
    (folder / ".metadata").write_bytes(pickle.dumps(contents))
    if (folder / NAME).exists():
        collect(Places(folder)).write(folder)
    return index.fqn


def change_arguments(folder: Path, **values: Any) -> None:
    """Changes the run's arguments that a checkpoint stores."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    from megatron_smar.checkpoint.metadata import COMMON_STATE, read_common_state, read_contents

    state = read_common_state(folder, read_contents(folder))
    vars(state["args"]).update(values)
    torch.save([state], content := io.BytesIO())
    poison_object(folder, BytesStorageMetadata, content.getvalue(), COMMON_STATE)
