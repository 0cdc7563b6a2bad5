# SPDX-License-Identifier: Apache-2.0
"""A job as an sbatch file, for people to read and to change."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_smar.launch import ended, started
from megatron_smar.launch.environment import exports
from megatron_smar.launch.job import Job
from megatron_smar.launch.preflight.state import AGAIN
from megatron_smar.launch.sweep import Element

ATTEMPT = r"""
attempt=${SLURM_RESTART_COUNT:-0}
logs=$logs/$job/attempt_$attempt
mkdir -p "$logs"
"""
# Below 32768 no program gets a port by chance; jobs that share a node have different numbers.
MEETING = r"""
# The first node is the meeting point of the ranks; the port follows from the job's number.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ,)
export MASTER_ADDR=${nodes%%,*}
"""
PORT = "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))"
STARTED = r"""
# Ends the job here if the run is complete, or if three attempts in a row have made no checkpoint.
{python} -m megatron_smar.launch.started "$logs" \
  --save "$save" --marker "$complete" \
  --after "${{SLURM_JOB_DEPENDENCY:-}}"
case $? in {complete}) exit 0 ;; {stopped}) exit 1 ;; esac
"""
FINISH = r"""
# Prints the first error{and_requeues}.
finish() {{
  {condition}{python} -m megatron_smar.launch.ended "$logs" --status "$1"{flags}{requeue}
  exit "$1"
}}
"""
REQUEUE = r"""; then
    scontrol requeue "$job"
    sleep 60 # until SLURM ends this script
  fi"""
# A step of its own for each node, so that one that is lost or broken does not end the others' checks.
PREFLIGHT = r"""
# Preflight. Python names groups of nodes to try: each node by itself, then an all-reduce of those that are well, and of
# fewer nodes if that fails. A step of SLURM tries each group, until Python prints a table and chooses the nodes.
probe=$(cat <<'PROBE'
{element}{probe} -m megatron_smar.launch.preflight.probe {flags} -- {command}
PROBE
)
preflight=$logs/preflight
mkdir -p "$preflight"
while
  {python} -m megatron_smar.launch.preflight.rounds "$preflight" --nodes {nodes} --seconds {seconds} --among "$nodes"
  status=$?
  ((status == {again}))
do
  while read -r kind log number group; do
    (
      export PREFLIGHT=$kind PREFLIGHT_FOLDER=$preflight MASTER_ADDR=${{group%%,*}}
      tasks={tasks}
      timeout --kill-after=5 {seconds} srun --overlap --cpu-bind=none --kill-on-bad-exit=1 --nodes="$number" \
        --ntasks=$((number * tasks)) --ntasks-per-node=$tasks --nodelist="$group" {pyxis}bash -c "$probe"
      echo "status $?"
    ) </dev/null >"$preflight/$log" 2>&1 &
  done <"$preflight/groups"
  wait
done
((status == 0)) || finish $status
nodes=$(<"$preflight/nodes")
export MASTER_ADDR=${{nodes%%,*}}
"""
# bash stays when a signal ends the program, to log when and how it ended: that is how the first error is found.
TASK = r"""
task=$(cat <<'TASK'
trap : TERM USR1
{exports}
echo "rank $RANK on $(hostname) started at $(date +%FT%T.%3N)"
{element}{command}
status=$?
echo "rank $RANK on $(hostname) ended with status $status at $(date +%FT%T.%3N)"
exit $status
TASK
)
"""
RUN = r"""
# SLURM warns this script alone before the time limit (USR1); a preempted job gets TERM. The ranks then finish their
# step, save and exit. (A TERM to srun itself would kill them.)
trap 'signaled=1; scancel --signal=TERM "$job"' USR1 TERM

{srun} \
  --output="$logs/rank_%t.log" bash -c "$task" &
step=$!
signaled=1
while [[ -n $signaled ]]; do # a signal ends `wait`, not the ranks
  signaled=
  wait $step
  status=$?
done
finish $status
"""


def sbatch_script(job: Job) -> str:
    """Returns the job as the text of an sbatch file."""
    sections = [
        "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in _options(job)), "set -u"]),
        "\n".join([f"cd {shlex.quote(str(job.root))}", *_folders(job), ATTEMPT.strip("\n"), *_environment(job)]),
        MEETING if "MASTER_PORT" in job.environment else MEETING + PORT,
        *_begin(job),
        _finish(job),
        *_preflight(job),
        TASK.format(exports=_rank_variables(job), element=_element_words(job), command=_command(job)),
        RUN.format(srun=_srun(job)),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _options(job: Job) -> Iterator[str]:
    yield f"--job-name={job.name}"
    yield f"--nodes={job.nodes + job.spare_nodes}"
    yield f"--ntasks-per-node={1 if job.use_torchrun else job.processes_per_node}"
    if job.on_gpus:
        yield f"--gpus-per-node={job.processes_per_node}"
    if job.cpus_per_process is not None:
        yield f"--cpus-per-task={job.cpus_per_process * (job.processes_per_node if job.use_torchrun else 1)}"
    if job.time is not None:
        yield f"--time={job.time}"
    if job.elements:
        most = "" if job.parallel is None else f"%{job.parallel}"
        yield f"--array=0-{len(job.elements) - 1}{most}"
    yield f"--signal=B:USR1@{job.warning_seconds}"
    yield "--requeue" if job.requeues else "--no-requeue"
    yield "--open-mode=append"
    log = job.logs / ("%A_%a.log" if job.elements else "%j.log")
    yield f"--output={shlex.quote(str(log))}"
    yield from job.options


def _folders(job: Job) -> Iterator[str]:
    """Yields what differs between the elements of an array: the folders of logs and checkpoints."""
    if job.elements:
        yield "# An element's own name: SLURM_JOB_ID alone can be the number of the whole array."
        yield "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
        yield from _by_element(job, lambda element: _folders_of(job, element))
        return
    yield "job=$SLURM_JOB_ID"
    yield f"logs={_quoted(job.logs)}"
    if job.save is not None:
        yield f"save={_quoted(job.save)}"
        yield f"complete={_quoted(job.marker())}"


def _folders_of(job: Job, element: Element) -> str:
    words = f"logs={_quoted(job.logs / element.name)}"
    if element.save is not None:
        words += f" save={_quoted(element.save)} complete={_quoted(job.marker(element))}"
    return words


def _by_element(job: Job, words: Callable[[Element], str]) -> Iterator[str]:
    yield "case $SLURM_ARRAY_TASK_ID in"
    for number, element in enumerate(job.elements):
        yield f"  {number}) {words(element)} ;;"
    yield '  *) echo "there is no element $SLURM_ARRAY_TASK_ID" && exit 2 ;;'
    yield "esac"


def _element_words(job: Job) -> str:
    """Returns the lines that set an element's further words as "$@"."""
    if not job.elements:
        return ""
    return "\n".join(_by_element(job, lambda element: f"set -- {shlex.join(element.words)}")) + "\n"


def _environment(job: Job) -> Iterator[str]:
    if job.activate is not None:
        yield f"source {_quoted(job.activate / 'bin' / 'activate')}"
    for name, value in exports(job):
        yield f'export {name}="${{{name}:-{value}}}"'
    for name, value in job.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _begin(job: Job) -> Iterator[str]:
    if job.saves:
        yield STARTED.format(python=_once(job), complete=started.COMPLETE, stopped=started.STOPPED)


def _finish(job: Job) -> str:
    flags = ' \\\n    --save "$save" --marker "$complete"' if job.saves else ""
    if job.requeues:
        flags += f" --then {ended.REQUEUE}"
    elif job.chain > 1:
        flags += f" --then {ended.CHAIN}"
    return FINISH.format(
        and_requeues=", and requeues the job unless it is complete or has stopped making progress"
        if job.requeues
        else "",
        condition="if " if job.requeues else "",
        python=_once(job),
        flags=flags,
        requeue=REQUEUE if job.requeues else "",
    )


def _preflight(job: Job) -> Iterator[str]:
    if not job.preflight:
        return
    flags = f"--processes {job.processes_per_node} --seconds {job.preflight_seconds}"
    flags += " --gpus" if job.on_gpus else f" --cores {job.processes_per_node * (job.cpus_per_process or 1)}"
    yield PREFLIGHT.format(
        element=_element_words(job),
        probe=" ".join([*_in_image(job, job.on_gpus), _python(job)]),
        flags=flags,
        command=_words(job),
        python=_once(job),
        nodes=job.nodes,
        seconds=job.preflight_seconds,
        again=AGAIN,
        # One process for each GPU in an all-reduce; a node's own checks, and those without GPUs, have one process.
        tasks=f"$([[ $kind == all-reduce ]] && echo {job.processes_per_node} || echo 1)" if job.on_gpus else "1",
        pyxis="".join(f"{word} " for word in _pyxis(job)),
    )


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
        inside = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *_pyxis(job)]
    # The limit is for a file system that hangs, and long enough to import an image.
    return " ".join(["timeout", "600", *inside, _python(job)])


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


def _words(job: Job) -> str:
    return " ".join([*map(shlex.quote, job.command), *(['"$@"'] if job.elements else [])])


def _command(job: Job) -> str:
    program = [_python(job)]
    if job.use_torchrun:
        program += ["-m", "torch.distributed.run", "--nnodes", str(job.nodes)]
        program += ["--nproc-per-node", str(job.processes_per_node), "--rdzv-id", "$SLURM_JOB_ID"]
        program += ["--shutdown-timeout", str(job.warning_seconds)]  # to save when it is warned; 30 s by default
        program += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "$MASTER_ADDR:$MASTER_PORT"]
    return " ".join([*_in_image(job, job.on_gpus), *program, _words(job)])


def _srun(job: Job) -> str:
    each = 1 if job.use_torchrun else job.processes_per_node
    # Consecutive ranks on a node, whatever the site's default is.
    words = ["srun", "--kill-on-bad-exit=1", "--distribution=block", f"--nodes={job.nodes}"]
    words += [f"--ntasks={job.nodes * each}", f"--ntasks-per-node={each}", '--nodelist="$nodes"']
    if job.cpus_per_process is not None:  # srun does not inherit it from sbatch
        words.append("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    return " ".join([*words, *_pyxis(job)])


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
