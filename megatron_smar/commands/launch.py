# SPDX-License-Identifier: Apache-2.0
r"""Starts a run on SLURM, or on this machine.

    python tools/launch.py slurm --nodes 8 --time 24:00:00 --logs runs/mixtral/jobs -- pretrain_vlm.py FLAGS ...
    python tools/launch.py local --processes-per-node 2 -- pretrain_vlm.py FLAGS ...
    python tools/launch.py first-error runs/mixtral/jobs/1234/attempt_0

slurm writes an sbatch file into --logs, for you to read and to change, and submits it (--dry-run prints it and submits
nothing). The nodes are checked first, and --spare-nodes replace those that fail. SLURM starts one process per GPU;
--torchrun starts one torchrun per node instead. Before the time limit the run saves and is requeued, and it resumes
from its newest checkpoint; so it does after a failure, until three attempts in a row have made no new checkpoint.
--chain submits jobs that continue one another instead, --array a run for each line of a file. Each rank has a log, and
the first error of all of them ends the job's own log. local starts the same command under torchrun on this machine;
with --nodes it is started on each of them, with NODE_RANK and MASTER_ADDR set. first-error prints the first error of a
job's logs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_smar.launch import here
from megatron_smar.launch.command import check_words, folder_of, split
from megatron_smar.launch.first_error import first_error
from megatron_smar.launch.job import NO_COMMAND, Job
from megatron_smar.launch.script import sbatch_script
from megatron_smar.launch.sweep import Element, read_elements

PROGRAM = "launch.py"


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    # No abbreviations: a flag of the program before the -- is refused, and not taken for an option here.
    slurm = commands.add_parser("slurm", help="write an sbatch file and submit it", allow_abbrev=False)
    local = commands.add_parser("local", help="start the command under torchrun on this machine", allow_abbrev=False)
    for each in (slurm, local):
        each.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
        each.add_argument("--processes-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
        each.add_argument("--cpu", action="store_true", help="ranks without GPUs, on the CPU")
    slurm.add_argument("--logs", type=Path, required=True, help="folder of the sbatch file and of the jobs' logs")
    slurm.add_argument("--name", default="megatron_smar", help="the job's name (default: %(default)s)")
    slurm.add_argument("--cpus-per-process", type=int, help="CPU cores of each rank (default: SLURM's)")
    slurm.add_argument("--time", help="time limit, as HH:MM:SS or D-HH:MM:SS (default: the partition's)")
    slurm.add_argument(
        "--warning-seconds", type=int, default=120, metavar="S", help="to save before the limit (default: %(default)s)"
    )
    slurm.add_argument("--torchrun", action="store_true", help="one torchrun per node instead of one task per rank")
    slurm.add_argument("--activate", type=Path, help="virtual environment (default: that of this interpreter, if any)")
    slurm.add_argument("--container", help="image for pyxis, or a .sif file for apptainer")
    slurm.add_argument("--mount", nargs="+", default=[], metavar="SOURCE:TARGET", help="folders for the container")
    slurm.add_argument("--env", nargs="+", default=[], metavar="NAME=VALUE", help="further environment variables")
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="further option of sbatch, as --sbatch=--account=X",
    )
    slurm.add_argument("--no-preflight", action="store_true", help="start the ranks without checking the nodes")
    slurm.add_argument(
        "--preflight-seconds", type=int, default=60, metavar="S", help="limit of each round (default: %(default)s)"
    )
    slurm.add_argument(
        "--spare-nodes", type=int, default=0, metavar="K", help="further nodes, for those that the preflight leaves out"
    )
    slurm.add_argument(
        "--chain", type=int, default=1, metavar="N", help="submit N jobs, of which each continues the one before"
    )
    slurm.add_argument(
        "--array", type=Path, metavar="FILE", help="a job array: further flags of an element in each line"
    )
    slurm.add_argument("--array-parallel", type=int, metavar="M", help="elements that run at once (default: all)")
    slurm.add_argument("--no-requeue", action="store_true", help="never run again by itself")
    slurm.add_argument("--wait", action="store_true", help="return when the job has ended, with its exit status")
    slurm.add_argument("--dry-run", action="store_true", help="print the sbatch file and submit nothing")
    local.add_argument("--log", type=Path, metavar="FILE", help="add the output to this file, beside the terminal")
    first = commands.add_parser("first-error", help="print the first error of a job's logs")
    first.add_argument("folder", type=Path, help="the attempt's folder")
    return parser


def job_of(options: argparse.Namespace, command: Sequence[str]) -> Job:
    """Returns the job that the options describe.

    Raises:
        ValueError: They describe none; the message is one sentence.
    """
    variables = {}
    for given in options.env:
        name, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"--env {given} has no value; give NAME=VALUE.")
        variables[name] = value
    activate = options.activate
    if activate is None and options.container is None and sys.prefix != sys.base_prefix:
        activate = Path(sys.prefix)
    if activate is not None and not (activate / "bin" / "activate").is_file():
        raise ValueError(f"--activate {activate} is no virtual environment: it has no bin/activate.")
    elements: tuple[Element, ...] = ()
    if options.array is not None:
        command, elements = read_elements(options.array, command)
    save = folder_of(command, "--save")
    return Job(
        command=tuple(command),
        logs=options.logs.resolve(),
        root=Path.cwd(),
        name=options.name,
        nodes=options.nodes,
        processes_per_node=options.processes_per_node,
        on_gpus=not options.cpu,
        cpus_per_process=options.cpus_per_process,
        time=options.time,
        warning_seconds=options.warning_seconds,
        use_torchrun=options.torchrun,
        activate=activate,
        container=options.container,
        mounts=tuple(options.mount),
        environment=variables,
        options=tuple(options.sbatch),
        save=None if save is None else save.resolve(),
        requeue=not options.no_requeue,
        preflight=not options.no_preflight,
        preflight_seconds=options.preflight_seconds,
        spare_nodes=options.spare_nodes,
        chain=options.chain,
        elements=elements,
        parallel=options.array_parallel,
    )


def submit(job: Job, dry_run: bool, wait: bool = False) -> int:
    """Writes the job's sbatch file and submits it.

    Args:
        job: The job.
        dry_run: Print the file instead.
        wait: Return when the job has ended.

    Returns:
        The job's exit status if it is waited for, else 0.

    Raises:
        ValueError: SLURM refuses it, or is not there.
    """
    text = sbatch_script(job)
    if dry_run:
        print(text, end="")
        return 0
    file = job.logs / f"{job.name}.sbatch"
    if not job.elements and job.marker().is_file():
        raise ValueError(f"this run is complete: {job.marker()} says so; remove it to run the same command again.")
    job.logs.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    numbers: list[str] = []
    for index in range(job.chain):
        is_last = index == job.chain - 1
        number, status = _sbatch(job, file, numbers, wait and is_last)
        numbers.append(number)
        if status:
            return status
    return 0


def _sbatch(job: Job, file: Path, before: Sequence[str], wait: bool) -> tuple[str, int]:
    """Submits a file, to run after the last of other jobs; returns the job's number and, with `wait`, its status."""
    after = [f"--dependency=afterany:{before[-1]}"] if before else []
    words = ["sbatch", "--parsable", *(["--wait"] if wait else []), *after, str(file)]
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise ValueError(f"there is no sbatch here; {file} is written, submit it on the cluster.") from None
    assert process.stdout is not None
    number = process.stdout.readline().strip().partition(";")[0]
    if number:  # before the job has ended
        numbers = [*before, number]
        if len(numbers) == job.chain:
            print(_submitted(job, file, numbers), flush=True)
    _, errors = process.communicate()
    if process.returncode and not number:
        already = f" (submitted: {', '.join(before)})" if before else ""
        raise ValueError(f"sbatch refuses {file}: {errors.strip()}{already}")
    if process.returncode:
        print(f"{PROGRAM}: job {number} ended with status {process.returncode}; see {job.logs / number}.log")
    return number, process.returncode


def _submitted(job: Job, file: Path, numbers: Sequence[str]) -> str:
    """Returns a line with the jobs that were submitted, and where their logs are."""
    if job.elements:
        return f"job array {numbers[0]} of {len(job.elements)}: {file}; the elements' logs are in {job.logs}/ELEMENT"
    first = f"job {numbers[0]}" if job.chain == 1 else f"jobs {', '.join(numbers)}, one after the other"
    logs = job.logs / numbers[0]
    return f"{first}: {file}; the log is {logs}.log, those of the ranks are in {logs}"


def run_here(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs the command under torchrun and returns its exit status."""
    if not command:
        raise ValueError(NO_COMMAND)
    check_words(command)
    words = [*here.torchrun(options.nodes, options.processes_per_node, os.environ), *command]
    os.environ.setdefault("MEGATRON_SMAR_DEVICE", "cpu" if options.cpu else "cuda")
    os.environ.setdefault("OMP_NUM_THREADS", str(here.threads_of_each(options.processes_per_node)))
    return here.run(words, options.log)


def main() -> None:
    """Runs the command line."""
    words = sys.argv[1:]
    own, command = split(words)
    options, unknown = make_parser().parse_known_args(own)
    try:
        if unknown:
            raise ValueError(f"{unknown[0]} is no option of {options.action}; the command and its flags come after --.")
        if options.action == "slurm":
            sys.exit(submit(job_of(options, command), options.dry_run, options.wait))
        elif options.action == "local":
            sys.exit(run_here(options, command))
        else:
            print(first_error(options.folder) or f"No rank in {options.folder} ended with an error.")
    except (ValueError, OSError) as error:
        sys.exit(f"{PROGRAM}: error: {error}")


if __name__ == "__main__":
    main()
