# SPDX-License-Identifier: Apache-2.0
"""Every program refuses a checkpoint that asks for a command to be run, in one sentence, and does not run it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from tests.launch import TWO_STEPS, run
from tests.unsafe import Command, change_arguments, poison_object


@pytest.fixture
def unsafe(saved, tmp_path) -> Path:
    folder = shutil.copytree(saved, tmp_path / "unsafe")
    (folder / "iter_0000002" / ".metadata").write_bytes(pickle.dumps(Command(tmp_path / "was_run")))
    return folder


SLOW = pytest.mark.matrix
HOW = [[], pytest.param(["--finetune"], marks=SLOW), pytest.param(["--use-checkpoint-args"], marks=SLOW)]


@pytest.mark.parametrize("how", HOW)
def test_training_does_not_run_a_command_in_metadata_on_any_rank(world, unsafe, tmp_path, how):
    errors = world.errors(*TWO_STEPS, "--load", unsafe, *how)
    assert errors[0] == errors[1]
    assert "--load" in errors[0] and f"{unsafe}/iter_0000002/.metadata cannot be read (it asks for" in errors[0]
    assert not (tmp_path / "was_run").exists()


def test_training_does_not_run_a_command_in_another_ranks_random_state(world, saved, tmp_path):
    """The random state is read by one rank only; all ranks report the error."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    folder = shutil.copytree(saved, tmp_path / "unsafe")
    content = pickle.dumps(Command(tmp_path / "was_run"))
    name = poison_object(folder / "iter_0000002", BytesStorageMetadata, content, "rng_state")
    errors = world.errors(*TWO_STEPS, "--load", folder)
    assert errors[0] == errors[1] and f".distcp does not give {name}" in errors[0]
    assert not (tmp_path / "was_run").exists()


PROGRAMS = {
    "evaluate": "tools/evaluate.py FLAGS --load {load} --text {out}/text.jsonl --output {out}/results.json",
    "export": "tools/checkpoint/convert.py export --load {load} --hf {out}/hf --output {out}/exported",
    "upcycle": "tools/checkpoint/convert.py upcycle --load {load} --hf {out}/hf --output {out}/upcycled",
    "verify": "tools/checkpoint/convert.py verify --load {load} --hf {out}/hf",
    "inspect": "tools/checkpoint/convert.py inspect {load}",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[SLOW] if name != "evaluate" else []) for name in PROGRAMS])
def test_no_other_program_runs_a_command_in_metadata(world, unsafe, tmp_path, name):
    from tests.models import build_hf_model

    if name != "evaluate":
        build_hf_model(image_token_id=5).save_pretrained(tmp_path / "hf")
    (tmp_path / "text.jsonl").write_text('{"text": "Name a colour, please."}\n')
    command = []
    for word in PROGRAMS[name].format(load=unsafe, out=tmp_path).split():
        command += [*world.flags, "--micro-batch-size", "4"] if word == "FLAGS" else [word]
    done = run(*command, check=False)
    assert done.returncode != 0 and ".metadata cannot be read" in done.stdout and "Traceback" not in done.stdout
    assert not (tmp_path / "was_run").exists()


def test_evaluating_runs_no_code_that_the_checkpoints_arguments_switch_on(saved, tmp_path):
    """The stored --trust-remote-code would run the code of the tokenizer's folder, which the checkpoint names too."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = tmp_path / "tokenizer"
    words = {"<unk>": 0, "<img>": 1, "</img>": 2, "<IMG_CONTEXT>": 3}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>"))).save_pretrained(tokenizer)
    (tokenizer / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    folder = shutil.copytree(saved, tmp_path / "unsafe")
    tokenizer_flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    change_arguments(folder / "iter_0000002", trust_remote_code=True, **tokenizer_flags)
    (tmp_path / "text.jsonl").write_text('{"text": "Name a colour, please."}\n')
    files = ("--text", tmp_path / "text.jsonl", "--output", tmp_path / "results.json")
    done = run("tools/evaluate.py", "--load", folder, *files, check=False)
    assert "a folder's code is only run with --trust-remote-code" in done.stdout, done.stdout
    assert done.returncode != 0 and not (tmp_path / "was_run").exists()
