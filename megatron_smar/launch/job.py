# SPDX-License-Identifier: Apache-2.0
"""What a job runs, and on what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_smar.credentials import SECRET_NAME, check_address
from megatron_smar.launch.command import CONTROL, check_words, checksum
from megatron_smar.launch.sweep import Element

TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2})?")
NAME = re.compile(r"[A-Za-z0-9._-]+")
NO_COMMAND = "there is no command: give it after --, as in -- pretrain_vlm.py --config run.yaml."
# The least value of each number, and the flags whose names differ from the fields'.
LEAST = {
    "nodes": 1,
    "processes_per_node": 1,
    "cpus_per_process": 1,
    "warning_seconds": 1,
    "preflight_seconds": 5,
    "spare_nodes": 0,
    "chain": 1,
    "parallel": 1,
}
FLAGS = {"parallel": "array_parallel"}
EXPORTED = re.compile(r"[=,]([A-Za-z_][A-Za-z0-9_]*)=")  # names in sbatch's --export=NAME=VALUE,...
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """A job that trains on one or more nodes.

    Attributes:
        command: Program and flags, each one word: `pretrain_vlm.py`, `--config`, ...
        logs: Folder in which each job gets a folder with its ranks' logs.
        root: Folder from which the command is run.
        name: The job's name.
        nodes: Number of nodes.
        processes_per_node: Ranks on each node.
        on_gpus: Whether each rank has a GPU; otherwise it runs on the CPU.
        cpus_per_process: CPU cores of each rank; None for SLURM's default.
        time: Time limit in SLURM's form, such as 12:00:00 or 1-00:00:00; None for the partition's.
        warning_seconds: How long before the time limit SLURM warns, so that the run saves and is requeued.
        use_torchrun: Whether each node has one torchrun that starts its ranks; otherwise SLURM starts every rank.
        activate: Virtual environment to activate; None for the environment of the submission.
        container: Image in which the ranks run, by pyxis (`srun --container-image`) or, for a file that ends in .sif,
            by apptainer; None without a container.
        mounts: Folders that the container sees, as SOURCE:TARGET.
        environment: Further environment variables.
        options: Further options of sbatch, such as `--account=NAME`.
        save: Folder of the run's checkpoints, by which the progress of attempts is judged; None without.
        requeue: Whether the job runs again after a warning or a failure.
        preflight: Whether nodes are checked before the ranks start.
        preflight_seconds: How long each round of these checks may take; a node that takes longer is a fault.
        spare_nodes: Nodes that are allocated in addition, to replace those that the checks leave out.
        chain: Number of jobs that continue one another; instead of requeueing.
        elements: The runs of a job array; none for one run.
        parallel: How many of them run at the same time; None for all.
    """

    command: tuple[str, ...]
    logs: Path
    root: Path
    name: str = "megatron_smar"
    nodes: int = 1
    processes_per_node: int = 8
    on_gpus: bool = True
    cpus_per_process: int | None = None
    time: str | None = None
    warning_seconds: int = 120
    use_torchrun: bool = False
    activate: Path | None = None
    container: str | None = None
    mounts: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    save: Path | None = None
    requeue: bool = True
    preflight: bool = True
    preflight_seconds: int = 60
    spare_nodes: int = 0
    chain: int = 1
    elements: tuple[Element, ...] = ()
    parallel: int | None = None

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError(NO_COMMAND)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{FLAGS.get(name, name).replace('_', '-')} is {value}; give {least} or more.")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise ValueError(f"--time is {self.time}; give minutes, HH:MM:SS or D-HH:MM:SS.")
        if not NAME.fullmatch(self.name):
            raise ValueError(f"--name is {self.name!r}; give letters, digits, '.', '_' and '-'.")
        self._check_attempts()
        self._check_words()

    def _check_attempts(self) -> None:
        saves = {element.save is not None for element in self.elements} or {self.save is not None}
        if len(saves) > 1:
            raise ValueError("some elements of --array have --save and others not: give it in all lines, or in none.")
        if saves == {False} and (self.requeue or self.chain > 1):
            again = "a chain of jobs" if self.chain > 1 else "a requeued job"
            raise ValueError(
                f"the command has no --save, so that {again} would begin again: give it"
                + (", or --no-requeue." if self.chain == 1 else ".")
            )
        if self.spare_nodes and not self.preflight:
            raise ValueError("--spare-nodes has no effect with --no-preflight, which chooses the nodes: leave one out.")
        if self.elements and self.chain > 1:
            raise ValueError("--array and --chain exclude each other: the elements of an array are requeued.")
        if self.parallel is not None and not self.elements:
            raise ValueError("--array-parallel has no effect without --array.")

    def _check_places(self) -> None:
        places: dict[str, tuple[object, ...]] = {
            "--logs": (self.logs,),
            "--activate": (self.activate,),
            "--container": (self.container,),
            "--mount": self.mounts,
            "--save": (self.save, *(element.save for element in self.elements)),
            "the working directory": (self.root,),
        }
        for flag, values in places.items():
            for value in map(str, values):
                if CONTROL.search(value):  # a line of its own in the file would be a command
                    raise ValueError(f"{flag} is {value!r}, which has a line break; give a path without one.")
        if "%" in str(self.logs):
            raise ValueError(f"--logs is {self.logs}, where SLURM replaces what follows a %; give a path without it.")

    def _check_words(self) -> None:
        check_words(self.command)
        self._check_places()
        for name, value in self.environment.items():
            if not VARIABLE.fullmatch(name) or CONTROL.search(value):
                raise ValueError(f"--env {name}={value!r} is no variable; give NAME=VALUE on one line.")
            check_address(value, f"--env {name}")
            if SECRET_NAME.fullmatch(name):
                raise ValueError(
                    f"--env {name} would be written into a file that others may read: set it before you submit, "
                    "SLURM passes the environment on."
                )
        for option in self.options:
            if not option.startswith("--") or CONTROL.search(option):
                raise ValueError(f"--sbatch {option!r} is no option of sbatch; give it as --NAME=VALUE.")
            check_address(option, "--sbatch")
            if secret := next(filter(SECRET_NAME.fullmatch, EXPORTED.findall(option)), None):
                raise ValueError(
                    f"--sbatch exports {secret}, which would be written into a file that others may read: set it "
                    "before you submit, SLURM passes the environment on."
                )
        for mount in self.mounts:
            if ":" not in mount:
                raise ValueError(f"--mount {mount} is no mount; give SOURCE:TARGET.")
        if self.mounts and self.container is None:
            raise ValueError("--mount has no effect without --container.")

    @property
    def ranks(self) -> int:
        """Number of processes that train."""
        return self.nodes * self.processes_per_node

    @property
    def saves(self) -> bool:
        """Whether the run has checkpoints, by which the progress of attempts is judged."""
        return self.save is not None or any(element.save is not None for element in self.elements)

    def marker(self, element: Element | None = None) -> Path:
        """Returns the file that says that the run is complete: another one for each command line.

        Args:
            element: The run of an array, if the job is one.
        """
        if element is None:
            return self.logs / f"complete_{checksum(self.command)}"
        return self.logs / element.name / f"complete_{checksum([*self.command, *element.words])}"

    @property
    def requeues(self) -> bool:
        """Whether the job runs again by itself; a job of a chain leaves that to the next one."""
        return self.requeue and self.chain == 1
