# SPDX-License-Identifier: Apache-2.0
"""A loss spike is logged with the samples that its step has read, and training continues."""

import re

from megatron_smar.data.sample_log import read_recorded
from tests.launch import run_each_rank

STEPS = "--micro-batch-size 2 --global-batch-size 4 --num-workers 0 --lr 1e-5 --train-iters 13".split()


def test_a_spike_is_logged_with_the_samples_of_its_step_and_the_run_goes_on(world, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "loss,13,50,")
    monkeypatch.setenv("WINDOW", "10")
    command = ["tests/functional/faulty_run.py", *world.flags, *STEPS, "--record-samples", tmp_path]
    (done,) = run_each_rank(*command, ranks=1, timeout=200)
    ((step, keys),) = re.findall(r"WARNING: iteration (\d+): its lm loss, .*; its samples: (.*)", done.stdout)
    read = read_recorded(tmp_path)
    assert step == "13" and keys == "data-parallel rank 0: " + ", ".join(key for part in read[13][0] for key in part)
    assert "iteration       13/" in done.stdout
