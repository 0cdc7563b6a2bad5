# SPDX-License-Identifier: Apache-2.0
"""What the preflight tries next and what it concludes, from the output of nodes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smar.launch.preflight.rounds import advance
from megatron_smar.launch.preflight.state import AGAIN, LONGEST, Finding, Trial, failed_nodes, next_groups, read_trial
from megatron_smar.launch.preflight.verdict import LOCAL

NAMES = ("node1", "node2", "node3", "node4", "node5")


class Nodes:
    """Nodes as the batch script sees them: what they would print when they are tried.

    Args:
        folder: The preflight's folder.
        names: Their names.
    """

    def __init__(self, folder: Path, names: tuple[str, ...] = NAMES[:3]) -> None:
        self.folder, self.names = folder, names
        folder.mkdir(parents=True, exist_ok=True)
        self.own = {name: [Finding(name, check) for check in LOCAL] for name in names}
        self.skew = dict.fromkeys(names, 0.0)
        self.rounds: list[list[str]] = []

    def say(self, node: str, check: str, **changes: object) -> None:
        place = LOCAL.index(check)
        self.own[node][place] = Finding(node, check, **changes)

    def run(self, needed: int) -> tuple[int, str]:
        """Goes through all rounds, and returns the exit status and the report."""
        while (answer := advance(self.folder, self.names, needed, 60))[0] == AGAIN:
            lines = (self.folder / "groups").read_text().splitlines()
            self.rounds.append([line.split()[3] for line in lines])
            for line in lines:
                kind, log, number, group = line.split()
                assert len(group.split(",")) == int(number)
                said = [
                    f for node in group.split(",") for f in (self.own if kind == "node" else self._together())[node]
                ]
                text = "".join(finding.line() + "\n" for finding in said)
                (self.folder / log).write_text("srun: some words\n" + text + "status 0\n")
        return answer

    def _together(self) -> dict[str, list[Finding]]:
        speed = {"bandwidth": 2e9, "processes": len(self.names)}
        return {
            name: [
                Finding(name, "clock", details={"skew": self.skew[name]}),
                Finding(name, "all-reduce", details=speed),
            ]
            for name in self.names
        }


def test_nodes_that_are_well_are_not_all_reduced_or_not_used_in_order(tmp_path):
    nodes = Nodes(tmp_path)
    status, report = nodes.run(2)
    assert status == 0 and (tmp_path / "nodes").read_text() == "node1,node2\n"
    assert nodes.rounds == [["node1", "node2", "node3"], ["node1,node2,node3"]]
    assert "All-reduce of 3 processes: 2.00 GB/s bus bandwidth." in report
    assert "node3 is left out: it is a spare node that is not needed." in report


def test_a_node_with_a_fault_takes_part_in_the_all_reduce_or_is_used(tmp_path):
    nodes = Nodes(tmp_path)
    nodes.say("node1", "data", value="unreadable", fault="node1 cannot read x.")
    status, report = nodes.run(2)
    assert status == 0 and (tmp_path / "nodes").read_text() == "node2,node3\n"
    assert nodes.rounds[1] == ["node2,node3"] and "node1 cannot read x.\nnode1 is left out: see above." in report


def test_too_few_nodes_start_a_run(tmp_path):
    nodes = Nodes(tmp_path)
    nodes.own["node1"], nodes.own["node2"] = [], nodes.own["node2"][:3]
    status, report = nodes.run(2)
    assert status == 1 and not (tmp_path / "nodes").exists()
    assert "node1 did not answer within 60 s: look at it (scontrol show node node1)" in report
    assert "node2 stopped in the check of its save: look at it" in report
    assert report.endswith("The run needs 2 nodes that pass (well: node3); it does not start.")


def test_the_minority_s_versions_are_taken_for_the_right_ones(tmp_path):
    nodes = Nodes(tmp_path, NAMES)
    for name in NAMES:
        torch = "2.12.0" if name == "node1" else "2.13.0"
        nodes.say(name, "versions", details={"torch": torch} | ({"NCCL": "2.27"} if name != "node4" else {}))
    status, report = nodes.run(3)
    assert status == 0 and (tmp_path / "nodes").read_text() == "node2,node3,node5\n"
    assert "node1 has other versions, torch 2.12.0 (on 4 of 5 nodes: 2.13.0): give all nodes" in report
    assert "node4 has other versions, NCCL missing (on 4 of 5 nodes: 2.27)" in report


def test_a_clock_that_is_off_is_no_fault_or_a_small_difference_is_one(tmp_path):
    nodes = Nodes(tmp_path)
    nodes.skew |= {"node1": 0.0, "node2": -3.25, "node3": 0.9}
    status, report = nodes.run(3)
    assert status == 1 and report.count("clock of") == 1
    assert "the clock of node2 is 3.2 s behind that of node1: start its time service" in report


def test_a_node_whose_port_is_taken_is_where_nodes_meet(tmp_path):
    nodes = Nodes(tmp_path)
    nodes.say("node1", "port", value="taken", fault="port 1 is taken on node1.")
    status, report = nodes.run(2)
    assert status == 0 and (tmp_path / "nodes").read_text() == "node2,node3\n"
    assert nodes.rounds[1] == ["node2,node3"] and "port 1 is taken on node1." in report


def tried(world: tuple[str, ...], works) -> tuple[list[Trial], set[str]]:
    """Goes through the all-reduces of nodes; `works` says whether a group passes."""
    trials: list[Trial] = []
    for _ in range(20):
        groups = next_groups(world, trials)
        if not groups:
            return trials, set(failed_nodes(trials))
        members = [node for group in groups for node in group]
        assert len(set(members)) == len(members), "two groups would use one node, and its port, at the same time"
        for group in groups:
            assert list(group) == sorted(group)
            found = tuple(Finding(node, "all-reduce") for node in group) if works(group) else ()
            trials.append(Trial(group, found, 0, (), Path("log")))
    raise AssertionError("the rounds do not end")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)))
def test_a_bad_node_is_not_found_by_all_reduces_of_smaller_groups(number, alone, network):
    names = tuple(f"node{i}" for i in range(1, number + 1))
    broken = {names[i] for i in alone if i < number}  # fail even by themselves
    cut = {names[i] for i in network if i < number} - broken  # fail only with others
    well = [name for name in names if name not in broken | cut]
    trials, found = tried(names, lambda group: not broken & set(group) and (len(group) == 1 or not cut & set(group)))
    assert broken <= found and not found & set(well)
    if len(well) > 1:  # with fewer nobody knows which end of a pair is at fault
        assert found == broken | cut
        assert any(trial.passed and set(trial.nodes) == set(well) for trial in trials)


def test_a_network_that_fails_only_as_a_whole_lets_a_run_start(tmp_path):
    trials, found = tried(NAMES, lambda group: len(group) < 3)
    assert not found and not any(trial.passed and len(trial.nodes) > 2 for trial in trials)


def test_a_long_sentence_makes_a_line_that_slurm_cuts(tmp_path):
    line = Finding("node1", "data", "x" * 3000, "y" * 3000).line()
    assert len(line) <= LONGEST
    (tmp_path / "log").write_text(f"{line}\nstatus 124\n")
    trial = read_trial(["node1"], tmp_path / "log")
    assert trial.findings[0].fault.startswith("yyy") and trial.overdue and not trial.passed


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["srun: error: launch failed on node3", "srun: Job step aborted"], "srun: error: launch failed on node3"),
        (["Traceback ...", "ValueError: x", "srun: error: node1: task 0: Exited"], "ValueError: x"),
        (["srun: cluster configuration lacks support for cpu binding"], ""),
    ],
)
def test_what_a_silent_node_says_is_not_the_reason(tmp_path, lines, said):
    (tmp_path / "log").write_text("\n".join([*lines, "status 1"]))
    assert read_trial(["node1"], tmp_path / "log").said == said


def test_the_preflight_of_a_file_that_is_cut_fails_with_a_traceback(tmp_path):
    nodes = Nodes(tmp_path)
    assert advance(tmp_path, nodes.names, 2, 60)[0] == AGAIN
    (tmp_path / "1_node_node1.log").write_text('preflight: {"node": "node1", "che')
    status, report = advance(tmp_path, nodes.names, 2, 60)
    assert status == 1 and "node1 did not answer" in report
    assert json.loads((tmp_path / "rounds.json").read_text())["rounds"] == 1
