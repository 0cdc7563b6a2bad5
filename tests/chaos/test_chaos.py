# SPDX-License-Identifier: Apache-2.0
"""A short campaign of faults; `make chaos` runs the whole one."""

import pytest

from tests.chaos.campaign import RUNS, plan, run_campaign
from tests.chaos.faults import FAULTS, damage_newest, kill_all_in_save
from tests.functional.conftest import world
from tests.slurm.cluster import why_not

__all__ = ["world"]


def test_a_job_that_is_killed_in_a_save_and_finds_damage_has_another_result_than_an_undisturbed_one(world, tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    kinds = [kill_all_in_save, damage_newest]
    outcomes = run_campaign(world, list(RUNS)[1], kinds, 5, tmp_path, ranks=2)
    assert len(outcomes) == 2 and any(outcome.in_save for outcome in outcomes)
    assert any(outcome.lost > 0 for outcome in outcomes)


def test_the_plan_of_a_campaign_differs_between_two_runs_with_one_seed():
    import random

    assert plan(list(FAULTS), random.Random(1)) == plan(list(FAULTS), random.Random(1))
    assert plan(list(FAULTS), random.Random(1)) != plan(list(FAULTS), random.Random(2))
