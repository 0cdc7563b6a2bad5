# SPDX-License-Identifier: Apache-2.0
"""What a job runs, and on what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_smar.credentials import SECRET_NAME, check_address, check_flags

TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2})?")
NAME = re.compile(r"[A-Za-z0-9._-]+")
NO_COMMAND = "there is no command: give it after --, as in -- pretrain_vlm.py --config run.yaml."
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
CONTROL = re.compile(r"[\n\r\0]")
EXPORTED = re.compile(r"[=,]([A-Za-z_][A-Za-z0-9_]*)=")  # names in sbatch's --export=NAME=VALUE,...


def check_command(command: Sequence[str]) -> None:
    """Refuses a command with line breaks, or with a secret.

    Args:
        command: Program and flags.

    Raises:
        ValueError: It has one; the message does not contain the secret.
    """
    for word in command:
        if CONTROL.search(word):
            raise ValueError(f"the command's word {word!r} has a line break; give each flag on its own.")
    for word in command[1:]:
        if word.startswith("--") and SECRET_NAME.fullmatch(word.partition("=")[0]):
            raise ValueError(
                f"the command has {word.partition('=')[0]}, which every user of the node could read in `ps`: set "
                "an environment variable before you start it."
            )
    check_flags(command)


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
        save: Folder of the run's checkpoints, by which a requeued job's progress is judged; None without requeueing.
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

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError(NO_COMMAND)
        for name in ("nodes", "processes_per_node", "cpus_per_process", "warning_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; give 1 or more.")
        if self.time is not None and not TIME.fullmatch(self.time):
            raise ValueError(f"--time is {self.time}; give minutes, HH:MM:SS or D-HH:MM:SS.")
        if not NAME.fullmatch(self.name):
            raise ValueError(f"--name is {self.name!r}; give letters, digits, '.', '_' and '-'.")
        self._check_words()

    def _check_words(self) -> None:
        check_command(self.command)
        places: dict[str, tuple[object, ...]] = {
            "--logs": (self.logs,),
            "--activate": (self.activate,),
            "--container": (self.container,),
            "--mount": self.mounts,
            "--save": (self.save,),
            "the working directory": (self.root,),
        }
        for flag, values in places.items():
            for value in map(str, values):
                if CONTROL.search(value):  # a line of its own in the file would be a command
                    raise ValueError(f"{flag} is {value!r}, which has a line break; give a path without one.")
        if "%" in str(self.logs):
            raise ValueError(f"--logs is {self.logs}, where SLURM replaces what follows a %; give a path without it.")
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
