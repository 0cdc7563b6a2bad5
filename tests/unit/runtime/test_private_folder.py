# SPDX-License-Identifier: Apache-2.0
"""The folder of temporary files with fixed names, on a machine that others use too."""

import os
import tempfile

import pytest

from megatron_smar.runtime.private_folder import FOLDERS, private_folder, use_private_folder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_is_open_to_others_or_not_the_same_twice(temporary):
    folder = private_folder()
    assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
    assert private_folder() == folder


@pytest.mark.parametrize("attack", ["writable", "link", "owner", "file"])
def test_a_folder_that_somebody_else_prepared_is_used(temporary, attack):
    name = temporary / f"megatron_smar_{os.getuid()}"
    if attack == "link":
        (temporary / "elsewhere").mkdir()
        name.symlink_to(temporary / "elsewhere")
    elif attack == "file":
        name.touch()
    else:
        name.mkdir()
        name.chmod(0o777 if attack == "writable" else 0o755)
    if attack == "owner":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder to another user")
        os.chown(name, 65534, 65534)
    with pytest.raises(RuntimeError, match="so that another user could place code there: remove it, or set TMPDIR"):
        private_folder()


def test_compiled_code_and_indexes_are_read_from_a_folder_that_anyone_can_make(temporary, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    monkeypatch.delenv("ENERGON_LOCAL_COPY_TMP_DIR", raising=False)
    use_private_folder()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    assert os.environ["ENERGON_LOCAL_COPY_TMP_DIR"] == str(private_folder() / FOLDERS["ENERGON_LOCAL_COPY_TMP_DIR"])
