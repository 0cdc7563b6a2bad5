# SPDX-License-Identifier: Apache-2.0
"""The sbatch file: it is valid bash, and each option is where SLURM reads it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.launch.job import Job
from megatron_smar.launch.script import sbatch_script

TRAIN = ("pretrain_vlm.py", "--config", "run.yaml", "--save", "runs/a")


def job(**changes: object) -> Job:
    return Job(**{"command": TRAIN, "logs": Path("/logs"), "root": Path("/code"), "save": Path("/save")} | changes)


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("use_torchrun", [False, True])
@pytest.mark.parametrize("container", [None, "image.sif", "registry#image"])
@pytest.mark.parametrize("save", [None, Path("/a folder")])
@pytest.mark.parametrize("on_gpus", [False, True])
def test_the_script_is_no_valid_bash(use_torchrun, container, save, on_gpus):
    text = sbatch_script(
        job(
            on_gpus=on_gpus,
            use_torchrun=use_torchrun,
            container=container,
            save=save,
            requeue=save is not None,
            cpus_per_process=4,
        )
    )
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_sbatch_gets_the_job_s_size_and_the_warning():
    found = options(sbatch_script(job(nodes=4, time="1-00:00:00", cpus_per_process=12, options=("--account=x",))))
    assert found == {
        "job-name": "megatron_smar",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "time": "1-00:00:00",
        "signal": "B:USR1@120",
        "requeue": "",
        "open-mode": "append",
        "output": "/logs/%j.log",
        "account": "x",
    }


def test_one_torchrun_per_node_gets_the_cores_of_all_its_ranks_and_no_gpus_on_the_cpu():
    text = sbatch_script(job(nodes=2, use_torchrun=True, cpus_per_process=3, processes_per_node=4, on_gpus=False))
    found = options(text)
    assert (found["ntasks-per-node"], found["cpus-per-task"]) == ("1", "12") and "gpus-per-node" not in found
    assert "torch.distributed.run --nnodes 2 --nproc-per-node 4" in text


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\n\0\r"), min_size=1, max_size=20))
def test_a_word_of_the_command_reaches_the_program_changed(word):
    text = sbatch_script(job(command=("printf", "%s", word), save=None, requeue=False))
    task = text.split("task=$(cat <<'TASK'\n")[1].split("\nTASK\n")[0]
    line = next(line for line in task.split("\n") if "printf" in line)
    found = subprocess.run(["bash", "-c", line[line.index("printf") :]], capture_output=True, check=True)
    assert found.stdout.decode() == word


def test_a_variable_that_is_set_at_the_submission_wins_over_a_default():
    text = sbatch_script(job(environment={"NCCL_DEBUG": "INFO and more"}))
    assert 'export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"' in text
    assert "export NCCL_DEBUG='INFO and more'" in text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"command": ()}, "there is no command: give it after --"),
        ({"nodes": 0}, "--nodes is 0; give 1 or more"),
        ({"time": "soon"}, "--time is soon; give minutes, HH:MM:SS or D-HH:MM:SS"),
        ({"name": "a b"}, "--name is 'a b'"),
        ({"command": (*TRAIN, "--wandb-api-key", "x")}, "the command has --wandb-api-key"),
        ({"command": (*TRAIN, "--data-path", "https://me:pw@host/a")}, "--data-path has a user or password"),
        ({"command": (*TRAIN, "--data-path=https://host/a?sig=pw")}, "--data-path has a signature or other query"),
        ({"environment": {"HTTPS_PROXY": "http://me:pw@proxy"}}, "--env HTTPS_PROXY has a user or password"),
        ({"options": ("--export=ALL,WANDB_API_KEY=pw",)}, "--sbatch exports WANDB_API_KEY"),
        ({"logs": Path("/a%b")}, "--logs is /a%b, where SLURM replaces"),
        ({"environment": {"HF_TOKEN": "x"}}, "--env HF_TOKEN would be written into a file"),
        ({"environment": {"A-B": "x"}}, "--env A-B='x' is no variable"),
        ({"spare_nodes": 1, "preflight": False}, "--spare-nodes has no effect with --no-preflight"),
        ({"spare_nodes": -1}, "--spare-nodes is -1; give 0 or more"),
        ({"preflight_seconds": 1}, "--preflight-seconds is 1; give 5 or more"),
        ({"options": ("account=x",)}, "--sbatch 'account=x' is no option of sbatch"),
        ({"mounts": ("/a:/b",)}, "--mount has no effect without --container"),
        ({"mounts": ("/a",), "container": "i"}, "--mount /a is no mount"),
    ],
)
def test_a_job_that_cannot_be_described_is_refused_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        job(**changes)


PLACES = [("logs", Path), ("root", Path), ("activate", Path), ("save", Path), ("container", str), ("mounts", tuple)]


@pytest.mark.parametrize(("name", "kind"), PLACES)
def test_a_path_with_a_line_break_adds_a_command_to_the_script(name, kind):
    evil = "/a:\nTASK\ntouch was_run\n.sif"
    changes = {name: (evil,) if kind is tuple else kind(evil)} | ({"container": "i"} if name == "mounts" else {})
    with pytest.raises(ValueError, match="has a line break; give a path without one"):
        job(**changes)


@pytest.mark.parametrize("word", ["a b", "$(touch was_run)", "`touch was_run`", "'; touch was_run; '", '"', "#"])
def test_the_script_runs_what_a_path_contains(word, tmp_path):
    """The batch script itself is run, with a `srun` that only writes its arguments, and without SLURM's others."""
    for name in ("srun", "scontrol", "scancel", "python", "python3"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / word
    folder.mkdir()
    places = {"logs": folder / "logs", "root": folder, "save": folder / "save", "mounts": (f"{folder}:/a",)}
    text = sbatch_script(job(**places, container=word, command=("train.py", "--save", str(folder))))
    (output,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    assert shlex.split(output.removeprefix("#SBATCH ")) == [f"--output={folder}/logs/%j.log"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    text = text.replace("sleep 60", "true")
    done = subprocess.run(["bash"], input=text, text=True, env=environment, capture_output=True, cwd=tmp_path)
    assert f"--container-image={word}" in done.stdout.splitlines(), done.stderr
    assert f"--container-mounts={folder}:/a" in done.stdout.splitlines()
    assert not list(tmp_path.rglob("was_run")) and (folder / "logs/7/attempt_0").is_dir()
