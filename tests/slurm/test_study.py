# SPDX-License-Identifier: Apache-2.0
"""The runs of a study (examples/study) as a job array on a real SLURM."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.demo_sources import write_sources
from tests.functional.test_study import GRID, STUDY
from tests.launch import run
from tests.slurm.cluster import Cluster

SLURM = "--array-parallel 2 --cpus-per-process 1 --no-preflight"


@pytest.mark.matrix
def test_elements_of_a_studys_job_array_fail_or_do_not_share_their_stages(cluster: Cluster, tmp_path: Path):
    arms = {"none": {"modality-routing": "none"}, "hard": {"modality-routing": "hard"}}
    main = {"runs": {"large": dict.fromkeys(arms, 1)}, "chosen": {}}
    write_sources(tmp_path / "sources")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | {"arms": arms, "main": main}))
    places = ["--grid", tmp_path / "grid.yaml", "--output", tmp_path / "work", "--cache", tmp_path / "sources"]
    places += ["--results", tmp_path / "results"]
    client = {name: cluster.environment[name] for name in ("PATH", "SLURM_CONF")}
    said = run(STUDY, *places, f"--slurm={SLURM}", timeout=1800, rank=client).stdout
    array = re.findall(r"job array (\d+)|job (\d+)", said)
    assert array, said
    number = next(filter(None, array[-1]))
    logs = tmp_path / "work/jobs"
    for element in range(len(arms)):
        cluster.wait(f"{number}_{element}", "COMPLETED", "FAILED", seconds=900)
        assert cluster.state(f"{number}_{element}") == "COMPLETED", [file.read_text() for file in logs.rglob("*.log")]
    none, hard = (json.loads((tmp_path / f"results/main/large/{arm}/1.json").read_text()) for arm in arms)
    assert none["before"] == hard["before"] and none["after"]["msi"] != hard["after"]["msi"]
    assert f"{len(arms)} of {len(arms)} runs are done" in run(STUDY, *places, timeout=600).stdout
