# SPDX-License-Identifier: Apache-2.0
"""The message of a run that was stopped by a signal."""

from argparse import Namespace

import pytest

from megatron_smar.training.stop import describe_stop, resume_command


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("torchrun --nproc-per-node 8 p.py --lr 1e-3", "torchrun --nproc-per-node 8 p.py --lr 1e-3 --load out"),
        ("python p.py --load stage1 --finetune --save out", "python p.py --save out --load out"),
        ("python p.py --load=stage1 --finetune", "python p.py --load out"),
        ("python p.py --config run.yaml --layout 8", "python p.py --config run.yaml --layout 8"),
        ("python p.py --load-main-params-from-ckpt", "python p.py --load-main-params-from-ckpt --load out"),
    ],
)
def test_the_resume_command_starts_from_the_checkpoint_and_not_where_the_run_started(command, expected):
    assert resume_command("out", command.split()) == expected


def test_the_resume_command_is_quoted_for_the_shell():
    assert resume_command("my runs/a;b", ["p.py", "--name", "a b"]) == "p.py --name 'a b' --load 'my runs/a;b'"


def test_a_run_without_a_folder_to_save_in_says_that_nothing_was_saved():
    said = describe_stop(Namespace(curr_iteration=6, save=None))
    assert said == "stopped after step 7; nothing was saved, since there is no --save"


def test_the_resume_command_drops_the_flags_of_the_first_start_or_the_optimizer_would_be_lost():
    command = "p.py --load a --no-load-optim --no-load-rng --ckpt-step 3 --no-load-dataloader-state --lr 1"
    assert resume_command("out", command.split()) == "p.py --lr 1 --load out"
