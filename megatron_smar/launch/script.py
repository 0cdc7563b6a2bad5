# SPDX-License-Identifier: Apache-2.0
"""A job as an sbatch file, for people to read and to change."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_smar.launch.ended import STARTED, TRACKER
from megatron_smar.launch.job import Job

# Values that the trainer needs or the field recommends; a variable that is set before the submission wins.
DEFAULTS_ON_GPUS = {
    # Megatron's order of communication and computation under tensor parallelism needs one queue below Blackwell.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A communication error ends the rank instead of leaving it waiting.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
SHELL = r"""
# The first node of the allocation is the meeting point; the port follows from the job's number.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

attempt=${SLURM_RESTART_COUNT:-0}
logs=$logs/$SLURM_JOB_ID/attempt_$attempt
mkdir -p "$logs"
"""
START = r"""
cp {tracker} "$logs/{started}" 2>/dev/null # to see whether this attempt makes a new checkpoint
"""
# bash stays when a signal ends the program, to log when and how it ended: that is how the first error is found.
TASK = r"""
task=$(cat <<'TASK'
trap : TERM USR1
{exports}
{command}
status=$?
echo "rank $RANK on $(hostname) ended with status $status at $(date +%FT%T.%3N)"
exit $status
TASK
)
"""
RUN = r"""
# SLURM warns this script alone before the time limit (USR1); a preempted job gets TERM. The ranks then finish their
# step, save and exit. (A TERM to srun itself would kill them.)
trap 'signaled=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM

{srun} \
  --output="$logs/rank_%t.log" bash -c "$task" &
step=$!
signaled=1
while [[ -n $signaled ]]; do # a signal ends `wait`, not the ranks
  signaled=
  wait $step
  status=$?
done
"""
ENDED = r"""
# Prints the first error, and requeues the job unless it is complete or has stopped making progress.
if {python} -m megatron_smar.launch.ended "$logs" --status $status --save {save}; then
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until SLURM ends this script
fi
exit $status
"""
FAILED = r"""
{python} -m megatron_smar.launch.ended "$logs" --status $status
exit $status
"""


def sbatch_script(job: Job) -> str:
    """Returns the job as the text of an sbatch file."""
    ended = FAILED if job.save is None else ENDED
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {option}" for option in _options(job)),
            "set -u",
            f"cd {shlex.quote(str(job.root))}",
            *_environment(job),
            f"logs={shlex.quote(str(job.logs))}",
            SHELL.strip("\n"),
            *_start(job),
            TASK.format(exports=_rank_variables(job), command=_command(job)).rstrip("\n"),
            RUN.format(srun=_srun(job)).rstrip("\n"),
            ended.format(python=_once(job), save=shlex.quote(str(job.save))).rstrip("\n"),
            "",
        ]
    )


def _options(job: Job) -> Iterator[str]:
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={1 if job.use_torchrun else job.processes_per_node}"
    if job.on_gpus:
        yield f"--gpus-per-node={job.processes_per_node}"
    if job.cpus_per_process is not None:
        yield f"--cpus-per-task={job.cpus_per_process * (job.processes_per_node if job.use_torchrun else 1)}"
    if job.time is not None:
        yield f"--time={job.time}"
    yield f"--signal=B:USR1@{job.warning_seconds}"
    yield "--requeue" if job.save is not None else "--no-requeue"
    yield "--open-mode=append"
    yield f"--output={shlex.quote(f'{job.logs}/%j.log')}"
    yield from job.options


def _environment(job: Job) -> Iterator[str]:
    if job.activate is not None:
        yield f"source {shlex.quote(str(job.activate / 'bin' / 'activate'))}"
    defaults = {"MEGATRON_SMAR_DEVICE": "cuda" if job.on_gpus else "cpu"}
    if job.on_gpus:
        defaults |= DEFAULTS_ON_GPUS
    defaults["OMP_NUM_THREADS"] = str(job.cpus_per_process or 1)
    for name, value in defaults.items():
        if name not in job.environment:
            yield f"export {name}=${{{name}:-{value}}}"
    for name, value in job.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _start(job: Job) -> Iterator[str]:
    if job.save is not None:
        yield START.strip("\n").format(tracker=shlex.quote(str(job.save / TRACKER)), started=STARTED)


def _rank_variables(job: Job) -> str:
    if job.use_torchrun:
        return "export RANK=$SLURM_NODEID # of the node: torchrun numbers the ranks"
    return "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"


def _python(job: Job) -> str:
    return "python" if job.activate is not None or job.container is not None else "${PYTHON:-python3}"


def _once(job: Job) -> str:
    """Returns the words that start Python once, in the batch script, where the package is installed."""
    inside = _in_image(job, gpus=False)
    if job.container is not None and not inside:
        inside = ["srun", "--nodes=1", "--ntasks=1", *_pyxis(job)]
    return " ".join([*inside, _python(job)])


def _in_image(job: Job, gpus: bool) -> list[str]:
    """Returns the words that start a program in an apptainer image; none for other jobs."""
    if job.container is None or Path(job.container).suffix != ".sif":
        return []
    binds = [word for mount in job.mounts for word in ("--bind", shlex.quote(mount))]
    return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, shlex.quote(job.container)]


def _pyxis(job: Job) -> list[str]:
    """Returns srun's options for an image that pyxis starts; none for other jobs."""
    if job.container is None or Path(job.container).suffix == ".sif":
        return []
    mounts = [f"--container-mounts={shlex.quote(','.join(job.mounts))}"] if job.mounts else []
    return [f"--container-image={shlex.quote(job.container)}", *mounts]


def _command(job: Job) -> str:
    program = [_python(job)]
    if job.use_torchrun:
        program += ["-m", "torch.distributed.run", "--nnodes", str(job.nodes)]
        program += ["--nproc-per-node", str(job.processes_per_node), "--rdzv-id", "$SLURM_JOB_ID"]
        program += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "$MASTER_ADDR:$MASTER_PORT"]
    return " ".join([*_in_image(job, job.on_gpus), *program, *map(shlex.quote, job.command)])


def _srun(job: Job) -> str:
    words = ["srun", "--kill-on-bad-exit=1"]
    if job.cpus_per_process is not None:  # srun does not inherit it from sbatch
        words.append("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    return " ".join([*words, *_pyxis(job)])
