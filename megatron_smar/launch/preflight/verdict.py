# SPDX-License-Identifier: Apache-2.0
"""Which nodes are well, which ones the run uses, and the table and sentences that say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_smar.launch.preflight.state import Finding, Trial, failed_nodes

SKEW = 1.0  # seconds; the first error of many logs is found by time
COLUMNS = ("versions", "devices", "files", "save", "data", "port", "clock", "all-reduce")
LOCAL = COLUMNS[:6]
NETWORK = "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, firewall"


@dataclass(frozen=True)
class Verdict:
    """What the preflight has found.

    Attributes:
        nodes: All nodes of the job, in SLURM's order.
        chosen: Those that the run uses; empty if too few are well.
        faults: What is wrong with each node that is not well.
        together: What the all-reduce says that is no fault of one node: the bandwidth, or why it fails.
        cells: The table: for each node a text for each column.
    """

    nodes: tuple[str, ...]
    chosen: tuple[str, ...]
    faults: Mapping[str, tuple[str, ...]]
    together: str
    cells: Mapping[str, Mapping[str, str]]

    def report(self, needed: int, seconds: float) -> str:
        """Returns the table, and a sentence for each fault."""
        lines = [f"Preflight of {_count(len(self.nodes), 'node')} for {needed}, in {seconds:.0f} s:", *self._table()]
        lines += [self.together] if self.together else []
        lines += [fault for node in self.nodes for fault in self.faults.get(node, ())]
        if not self.chosen:
            well = [node for node in self.nodes if not self.faults.get(node)]
            what = f"well: {', '.join(well)}" if well else "well: none"
            lines.append(f"The run needs {_count(needed, 'node')} that pass ({what}); it does not start.")
        elif len(self.chosen) < len(self.nodes):
            out = [node for node in self.nodes if node not in self.chosen]
            lines += [f"{node} is left out: " + self._why(node) for node in out]
            lines.append(f"The run uses {', '.join(self.chosen)}.")
        return "\n".join(lines)

    def _why(self, node: str) -> str:
        return "see above." if self.faults.get(node) else "it is a spare node that is not needed."

    def _table(self) -> list[str]:
        rows = [["node", *COLUMNS, "used"]]
        for node in self.nodes:
            cells = [self.cells[node].get(name, "-") for name in COLUMNS]
            rows.append([node, *cells, "yes" if node in self.chosen else "no"])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def judge(own: Sequence[Trial], together: Sequence[Trial], needed: int, seconds: float) -> Verdict:
    """Judges what all nodes have said.

    Args:
        own: The nodes' own checks, one trial for each node, in SLURM's order.
        together: The all-reduces that were tried.
        needed: Number of nodes that the run needs.
        seconds: Time limit of each trial.
    """
    nodes = tuple(trial.nodes[0] for trial in own)
    faults = local_faults(own, seconds)
    cells = {trial.nodes[0]: {finding.check: finding.value for finding in trial.findings} for trial in own}
    for node, fault in version_faults(own).items():
        faults.setdefault(node, []).append(fault)
        cells[node]["versions"] = "other"
    for node, trial in failed_nodes(together).items():
        faults.setdefault(node, []).append(_collective_fault(node, trial))
        cells[node]["all-reduce"] = "fails"
    for trial in [trial for trial in together if trial.passed][-1:]:
        for finding in trial.findings:
            cells[finding.node].setdefault(finding.check, finding.value)
            if sentence := _clock_fault(finding, trial.nodes[0]):
                faults.setdefault(finding.node, []).append(sentence)
    well = [node for node in nodes if node not in faults]
    text, works = _together(well, together)
    chosen = tuple(well[:needed]) if works and len(well) >= needed else ()
    return Verdict(nodes, chosen, {node: tuple(said) for node, said in faults.items()}, text, cells)


def well_alone(own: Sequence[Trial], seconds: float) -> tuple[str, ...]:
    """Returns the nodes that have passed their own checks, in SLURM's order."""
    bad = local_faults(own, seconds).keys() | version_faults(own).keys()
    return tuple(trial.nodes[0] for trial in own if trial.nodes[0] not in bad)


def local_faults(own: Sequence[Trial], seconds: float) -> dict[str, list[str]]:
    """Returns what is wrong with each node by its own checks; no answer is a fault."""
    faults: dict[str, list[str]] = {}
    for trial in own:
        node = trial.nodes[0]
        said = [finding.fault for finding in trial.findings if finding.fault]
        done = {finding.check for finding in trial.findings}
        if missing := next((name for name in LOCAL if name not in done), None):
            said.append(_silent(node, trial, missing if done else None, seconds))
        if said:
            faults[node] = said
    return faults


def version_faults(own: Sequence[Trial]) -> dict[str, str]:
    """Returns the nodes whose versions are not those of most nodes, or of the first one if there are as many."""
    have = {f.node: f.details for trial in own for f in trial.findings if f.check == "versions" and not f.fault}
    faults: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for versions in have.values() for name in versions):
        values = [versions.get(name, "missing") for versions in have.values()]
        most, times = Counter(values).most_common(1)[0]
        for node, versions in have.items():
            if (value := versions.get(name, "missing")) != most:
                faults.setdefault(node, []).append(f"{name} {value} (on {times} of {len(have)} nodes: {most})")
    same = "give all nodes the same environment (--activate, or a container)"
    return {node: f"{node} has other versions, {', '.join(said)}: {same}." for node, said in faults.items()}


def _silent(node: str, trial: Trial, missing: str | None, seconds: float) -> str:
    look = f"look at it (scontrol show node {node}) or leave it out (--sbatch=--exclude={node})"
    if missing is not None:
        return f"{node} stopped in the check of its {missing}: {look}; its output is {trial.log}."
    if trial.overdue or not trial.said:
        return f"{node} did not answer within {seconds:.0f} s: {look}."
    return f"{node} cannot run the checks ({trial.said}): {look}; its output is {trial.log}."


def _collective_fault(node: str, trial: Trial) -> str:
    other = next((name for name in trial.nodes if name != node), None)
    where = f"with {other}, which works with another node" if other else "by itself"
    look = f"look at its network ({NETWORK})" if other else "look at its installation and devices"
    return f"{node} fails in an all-reduce {where} ({_reason(trial, node)}): {look}; its output is {trial.log}."


def _reason(trial: Trial, node: str | None = None) -> str:
    """Returns why a group failed, in the words of a node if it has said something."""
    faults = [finding for finding in trial.findings if finding.fault]
    said = next((finding.fault for finding in sorted(faults, key=lambda finding: finding.node != node)), None)
    if said is None and trial.overdue:
        return "no answer"
    return said or trial.said or "no output"


def _together(well: Sequence[str], tried: Sequence[Trial]) -> tuple[str, bool]:
    """Returns what the last all-reduce of all nodes that are well says, and whether it works."""
    passed = [trial for trial in tried if trial.passed and set(well) <= set(trial.nodes)]
    if not well or passed:
        details = [f.details for trial in passed[-1:] for f in trial.findings if f.check == "all-reduce"]
        if not details or details[0]["processes"] == 1:
            return "", bool(well)
        speed = min(float(each["bandwidth"]) for each in details)
        return f"All-reduce of {details[0]['processes']} processes: {speed / 1e9:.2f} GB/s bus bandwidth.", True
    whole = next((trial for trial in reversed(tried) if set(well) <= set(trial.nodes)), None)
    if whole is None:
        return "", False
    return (
        f"The all-reduce of {', '.join(whole.nodes)} fails ({_reason(whole)}), and smaller groups do not tell which "
        f"node is at fault: look at the network between them ({NETWORK}); the output is {whole.log}.",
        False,
    )


def _clock_fault(finding: Finding, first: str) -> str | None:
    skew = float(finding.details.get("skew", 0.0)) if finding.check == "clock" else 0.0
    if abs(skew) <= SKEW:
        return None
    how = "ahead of" if skew > 0 else "behind"
    return (
        f"the clock of {finding.node} is {abs(skew):.1f} s {how} that of {first}: start its time service (chronyc "
        "tracking); the first error of a job is found by time."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
