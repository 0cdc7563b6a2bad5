# SPDX-License-Identifier: Apache-2.0
"""A folder for temporary files with fixed names, which no other user of the machine can have prepared.

torch compiles into /tmp/torchinductor_USER and runs what it finds there; energon reads copies of remote indexes in
/tmp/energon_local_copy. Neither asks who made the folder.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

# Variables that name the folders, and the folders' names in the private one. A variable that is set wins.
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "torchinductor", "ENERGON_LOCAL_COPY_TMP_DIR": "energon"}


def use_private_folder() -> None:
    """Makes torch and energon use a folder of this user alone; to be called before they are imported.

    Raises:
        RuntimeError: As for `private_folder`.
    """
    missing = {variable: name for variable, name in FOLDERS.items() if not os.environ.get(variable)}
    if missing:
        folder = private_folder()
        os.environ.update({variable: str(folder / name) for variable, name in missing.items()})


def private_folder() -> Path:
    """Returns this user's folder below TMPDIR (/tmp); creates it if necessary.

    Raises:
        RuntimeError: It is somebody else's, a link, or others may write into it.
    """
    folder = Path(tempfile.gettempdir()) / f"megatron_smar_{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass  # made by an earlier program or another rank: checked below
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot be made ({error.strerror}); set TMPDIR to a folder of your own."
        ) from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} is no folder that only you can write to, so that another user could place code there: remove "
            "it, or set TMPDIR to a folder of your own."
        )
    return folder
