# SPDX-License-Identifier: Apache-2.0
"""Run files: the command line that a file gives, and the errors for files that are not valid."""

from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("single_rank")  # the parser of flags is Megatron's

FILE = """
model:
  num-layers: 2
  swiglu: true
  bf16: false
training:
  freeze: [vision, connector]
  lr: 1e-3
layouts:
  8: {expert-model-parallel-size: 8}
  tiny:
    expert_model_parallel_size: 2
    num-layers: 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def test_flags_of_the_command_line_override_those_of_the_file(file):
    from megatron_smar.config.run_file import expand

    words = expand(["--lr", "2", "--config", str(file), "--layout", "8", "--save", "x"])
    flags = "--num-layers 2 --swiglu --freeze vision connector --lr 1e-3 --expert-model-parallel-size 8 --lr 2 --save x"
    assert words == flags.split()


def test_a_layout_overrides_its_file_and_a_later_file_overrides_both(file, tmp_path):
    from megatron_smar.config.run_file import expand

    (tmp_path / "more.yaml").write_text("num-layers: 7\n")
    words = expand(["--config", str(file), str(tmp_path / "more.yaml"), "--layout", "tiny"])
    assert words[words.index("--num-layers") + 1] == "7" and words.count("--num-layers") == 1
    assert words[words.index("--expert-model-parallel-size") + 1] == "2"


def test_a_switch_of_the_file_can_be_left_out_on_the_command_line(file):
    from megatron_smar.config.run_file import expand

    assert "--swiglu" not in expand(["--config", str(file), "--layout", "8", "--unset", "swiglu"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("num-layer: 2", [], r"num-layer is not a flag \(close to it: num-layers.*\)"),
        ("a: {lr: 1}\nb: {lr: 2}", [], "gives lr twice"),
        ("lr: 1\nlr: 2", [], "'lr' is given twice"),
        ("swiglu: 3", [], "swiglu is 3, but the flag takes no value: write true or false"),
        ("lr: true", [], "lr is true, but the flag takes a value"),
        ("lr: [1, 2]", [], "lr is a list, but the flag takes one value"),
        ("- lr", [], "is not a mapping of flags"),
        ("lr: [", [], "cannot be read"),
        (FILE, [], "--layout is missing: give one of 8, tiny"),
        (FILE, ["--layout", "16"], "--layout 16 is not in .*: give one of 8, tiny"),
        ("lr: 1", ["--unset", "bf16"], "--unset bf16 is not in"),
    ],
)
def test_an_invalid_run_file_is_refused_in_one_sentence(text, options, message, tmp_path):
    from megatron_smar.config.run_file import expand

    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        expand(["--config", str(path), *options])
    assert "\n" not in str(raised.value)


def test_layout_without_a_run_file_is_refused():
    from megatron_smar.config.run_file import expand

    with pytest.raises(ValueError, match="--layout 8 refers to a file of flags: give the file as --config"):
        expand(["--layout", "8"])


def test_the_run_file_that_a_run_writes_gives_the_same_command_line(tmp_path):
    from megatron_smar.config.run_file import expand, read_flags, write_run_file

    argv = "--num-layers 2 --freeze vision connector --swiglu --lr 1e-3 --vision-feature-layer -2 --save=x y".split()
    write_run_file(tmp_path, [*argv, "--moe-layer-freq", "([0]+[1]*3)"])
    flags = read_flags(tmp_path / "run.yaml")
    assert flags["freeze"] == ["vision", "connector"] and flags["swiglu"] is True
    assert flags["vision-feature-layer"] == -2 and flags["moe-layer-freq"] == "([0]+[1]*3)"
    words = expand(["--config", str(tmp_path / "run.yaml")])
    assert sorted(words) == sorted([*argv[:-2], "--save", "x y", "--moe-layer-freq", "([0]+[1]*3)"])


def test_an_option_without_its_value_is_refused_in_one_sentence():
    from megatron_smar.config.run_file import expand

    with pytest.raises(ValueError, match="argument --config: expected at least one argument; docs"):
        expand(["--num-layers", "2", "--config"])


def test_a_command_line_without_a_file_stays_as_it_is():
    from megatron_smar.config.run_file import expand

    argv = [
        "--vision-feature-layer",
        "-2",
        "--save=a b",
        "--freeze",
        "--moe-layer-freq",
        "([0]+[1]*3)",
        "--lr",
        "-1e-3",
    ]
    assert expand(argv) == argv


def test_every_run_file_of_the_examples_has_only_flags():
    from megatron_smar.config.run_file import expand
    from tests.launch import ROOT

    # Of the examples' programs.
    others = {"quick.yaml", "strategies.yaml", "sizes.yaml", "variants.yaml", "grid.yaml", "grid_smollm2.yaml"}
    found = sorted((ROOT / "examples").glob("*/*.yaml"))
    files = [file for file in found if not file.name.startswith("data_") and file.name not in others]
    assert len(files) >= 10
    for file in files:
        layouts = list(map(str, yaml.safe_load(file.read_text()).get("layouts", ()))) or [None]
        published_recipe = file.parent.name not in ("emoji_tiny", "smollm2_moe") and "pilot" not in file.name
        assert not published_recipe or {"64", "256", "1024", "tiny"} <= set(filter(None, layouts))
        for layout in layouts:
            assert expand(["--config", str(file), *(["--layout", layout] if layout else [])])
