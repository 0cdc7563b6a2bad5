# SPDX-License-Identifier: Apache-2.0
"""Output folders are written completely or not at all."""

import pytest

from megatron_smar.checkpoint.folders import ConversionError, copy_companions, first_few, whole_or_nothing


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    output = tmp_path / "new" / "output"
    with whole_or_nothing(output, 1) as folder:
        (folder / "weights").write_text("x")
        assert not output.exists()
    assert (output / "weights").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["output"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_while_writing_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), whole_or_nothing(tmp_path / "output", 1) as folder:
        (folder / "weights").write_text("x")
        raise error
    assert not any(tmp_path.iterdir())


def test_the_remains_of_a_killed_conversion_are_replaced(tmp_path):
    (tmp_path / "output.partial").mkdir()
    (tmp_path / "output.partial" / "half").write_text("x")
    with whole_or_nothing(tmp_path / "output", 1) as folder:
        (folder / "weights").write_text("x")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["weights"]


def test_an_empty_output_folder_may_exist_already(tmp_path):
    (tmp_path / "output").mkdir()
    with whole_or_nothing(tmp_path / "output", 1) as folder:
        (folder / "weights").write_text("x")
    assert (tmp_path / "output" / "weights").is_file()


def refused(output, needed=1) -> str:
    """Returns the message with which an output is refused."""
    with pytest.raises(ConversionError) as refusal, whole_or_nothing(output, needed):
        raise AssertionError("the output was accepted")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_existing_files_and_folders_are_kept(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for name in ("file", "full"):
        assert f"--output {tmp_path / name} exists already; give a new folder" in refused(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "x"


def test_a_disk_with_too_little_room_is_reported_before_anything_is_written(tmp_path):
    assert "needs 1e+09 GB, but its disk has" in refused(tmp_path / "new" / "output", 10**18)
    assert not any(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    assert f"--output {tmp_path / 'file' / 'output'} cannot be written" in refused(tmp_path / "file" / "output")


def test_copied_companions_are_neither_weights_nor_code_nor_config_and_the_first_origin_wins(tmp_path):
    for name in ("one", "two", "copy"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer.json", "config.json", "model.safetensors", "model.safetensors.index.json", "code.py"):
        (tmp_path / "one" / name).write_text("one")
    for name in ("tokenizer.json", "preprocessor_config.json", "pytorch_model.bin", "x.gguf"):
        (tmp_path / "two" / name).write_text("two")
    (tmp_path / "one" / "original").mkdir()
    copy_companions([tmp_path / "one", tmp_path / "two"], tmp_path / "copy")
    copied = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()}
    assert copied == {"tokenizer.json": "one", "preprocessor_config.json": "two"}


def test_a_long_list_says_how_many_names_are_left_out():
    assert first_few("abcde") == "a, b, c, d, e"
    assert first_few("abcdefg") == "a, b, c, d, e and 2 more"
