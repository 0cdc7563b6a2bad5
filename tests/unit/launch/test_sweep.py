# SPDX-License-Identifier: Apache-2.0
"""A job array: the elements of a file, their names, folders and words."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_smar.launch.job import Job
from megatron_smar.launch.script import sbatch_script
from megatron_smar.launch.sweep import name_of, read_elements

SAVE = ("train.py", "--save", "/runs/a", "--load", "/runs/a", "--lr", "1")


def sweep(tmp_path: Path, text: str, command: tuple[str, ...] = SAVE):
    file = tmp_path / "sweep.txt"
    file.write_text(text)
    return read_elements(file, command)


def test_elements_share_checkpoints_or_resume_from_another_folder(tmp_path):
    command, (first, second) = sweep(tmp_path, "# learning rates\n--lr 1e-4\n\n--lr 3e-4 --save /other # larger\n")
    assert command == ("train.py", "--lr", "1")
    assert (first.name, first.save) == ("lr_1e-4", Path("/runs/a/lr_1e-4"))
    assert first.words == ("--lr", "1e-4", "--save", "/runs/a/lr_1e-4", "--load", "/runs/a/lr_1e-4")
    assert (second.name, second.save) == ("lr_3e-4", Path("/other"))
    assert second.words == ("--lr", "3e-4", "--save", "/other", "--load", "/other")


def test_a_load_that_is_the_common_start_is_replaced(tmp_path):
    command, (element,) = sweep(tmp_path, "--lr 1", ("train.py", "--load=/start", "--save=/runs/a"))
    assert command == ("train.py", "--load=/start") and element.words == ("--lr", "1", "--save", "/runs/a/lr_1")


def test_an_element_s_name_depends_on_its_line_or_two_elements_get_one_name(tmp_path):
    names = [element.name for element in sweep(tmp_path, "--a 1\n--b 2\n")[1]]
    assert [element.name for element in sweep(tmp_path, "--b 2\n")[1]] == names[1:] == ["b_2"]
    assert name_of(["--a", "x/y"]) != name_of(["--a", "x-y"]) == "a_x-y"
    assert len(name_of(["--a", "x" * 200])) <= 60 and "/" not in name_of(["--a", "../x"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("--a 'x\n", "line 1 of .*sweep.txt cannot be read .No closing quotation.: close its quotes"),
        ("# nothing\n", ".*sweep.txt has no element"),
        ("x --a\n", "line 1 of .*sweep.txt begins with 'x'; give flags"),
        ("--a 1\n--a  1\n", "two elements of .*sweep.txt have the same flags"),
        ("--a 1 --save /x\n--a 2 --save /x\n", "two elements of .*sweep.txt have --save /x"),
        ("--a 1\n--wandb-api-key x\n", "line 2 of .*sweep.txt has --wandb-api-key, which every user"),
    ],
)
def test_a_file_that_is_no_sweep_is_accepted(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        sweep(tmp_path, text)


def test_a_sweep_without_checkpoints_is_requeued_to_begin_again_or_mixed_with_one_that_has_them(tmp_path):
    command, elements = sweep(tmp_path, "--a 1\n--a 2", ("train.py",))
    with pytest.raises(ValueError, match="the command has no --save, so that a requeued job would begin again"):
        Job(command, tmp_path / "l", tmp_path, elements=elements)
    text = sbatch_script(Job(command, tmp_path / "l", tmp_path, elements=elements, requeue=False))
    assert "save" not in text.split("case $SLURM_ARRAY_TASK_ID in")[1].split("esac")[0] and "launch.started" not in text
    command, elements = sweep(tmp_path, "--a 1\n--a 2 --save /s", ("train.py",))
    with pytest.raises(ValueError, match="some elements of --array have --save and others not"):
        Job(command, tmp_path / "l", tmp_path, elements=elements, requeue=False)


def test_a_word_of_an_element_reaches_the_shell_or_the_program_changed(tmp_path):
    words = """--text 'a "b" $(touch x) `y` ; \\' --glob '*'"""
    command, elements = sweep(tmp_path, f"--a 1\n{words}\n", ("-c", "import sys; print(sys.argv[1:])", "--save", "/s"))
    job = Job(command, tmp_path / "l", tmp_path, processes_per_node=1, elements=elements, parallel=1, preflight=False)
    text = sbatch_script(job)
    assert "#SBATCH --array=0-1%1\n" in text and "%A_%a.log" in text
    task = text.split("task=$(cat <<'TASK'\n")[1].split("\nTASK\n")[0]
    environment = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}
    environment |= {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", task], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"{list(elements[1].words)}\n" in done.stdout and elements[1].words[1] == 'a "b" $(touch x) `y` ; \\'
    assert not (tmp_path / "x").exists()


def test_an_element_s_folders_are_those_of_another_one_or_its_job_is_the_whole_array(tmp_path):
    command, elements = sweep(tmp_path, "--a 1\n--b 'x y'\n")
    text = sbatch_script(Job(command, tmp_path / "l", tmp_path, elements=elements))
    folders = text[text.index("job=") : text.index("attempt=")]
    shown = 'echo "$job|$logs|$save|$complete"'
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["bash", "-uc", folders + shown], env=variables, capture_output=True, text=True, check=True)
    *found, marker = done.stdout.strip().split("|")
    assert found == ["7_1", f"{tmp_path}/l/{elements[1].name}", f"/runs/a/{elements[1].name}"]
    assert marker.startswith(f"{tmp_path}/l/{elements[1].name}/complete_")
    assert not re.search(r"(scancel|requeue) .*SLURM_JOB_ID", text)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chain": 2}, "--array and --chain exclude each other"),
        ({"parallel": 0}, "--array-parallel is 0; give 1 or more"),
        ({"elements": (), "parallel": 2, "save": Path("s")}, "--array-parallel has no effect without --array"),
    ],
)
def test_an_array_that_cannot_be_submitted_is_accepted(tmp_path, changes, sentence):
    command, elements = sweep(tmp_path, "--a 1")
    with pytest.raises(ValueError, match=f"^{sentence}"):
        Job(**{"command": command, "logs": tmp_path, "root": tmp_path, "elements": elements} | changes)
