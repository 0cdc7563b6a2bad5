# SPDX-License-Identifier: Apache-2.0
"""Environment variables that a job sets. A variable that is set at the submission, or by --env, wins."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_smar.launch.job import Job

# What a rank has written before it is killed is in its log.
ALWAYS = {"PYTHONUNBUFFERED": "1"}
ON_GPUS = {
    # Megatron's order of communication and computation under tensor parallelism needs one queue below Blackwell.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # NCCL says why it fails, which it does not by default; it writes nothing otherwise.
    "NCCL_DEBUG": "WARN",
    # torch writes a rank's last collectives when one exceeds its time limit; by default into the user's home.
    "TORCH_FR_DUMP_TEMP_FILE": "$logs/nccl_trace_rank_",
}


def exports(job: Job) -> Iterator[tuple[str, str]]:
    """Yields the names and values of the variables that a job sets; `$logs` in a value is the attempt's folder."""
    defaults = {"MEGATRON_SMAR_DEVICE": "cuda" if job.on_gpus else "cpu"}
    defaults |= ALWAYS | (ON_GPUS if job.on_gpus else {})
    defaults["OMP_NUM_THREADS"] = str(job.cpus_per_process or 1)
    for name, value in defaults.items():
        if name not in job.environment:
            yield name, value
