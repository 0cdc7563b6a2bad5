# SPDX-License-Identifier: Apache-2.0
"""The commands that the recipes' scripts start on GPUs, recorded from what the scripts give the launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT, users_environment

# Recipe -> its stages in order.
STAGES = {
    "mixtral_8x7b_internvit": ("stage1", "stage2"),
    "qwen3_30b_a3b_internvl": ("stage1", "stage2"),
    "moe_llava_phi": ("stage3",),
}
# The report of the last step starts nothing on GPUs.
RECORDER = '#!/bin/bash\n[[ $* == *tools/report.py* ]] || printf "%s\\0" "$@" >"$RECORD"\n'


def run_script(recipe: str, script: str, output: Path, *options: str, **environment: str) -> None:
    """Runs one of a recipe's scripts with the given output folder; a failure shows what the script printed."""
    done = subprocess.run(
        ["bash", ROOT / "examples" / recipe / f"{script}.sh", *options],
        env=users_environment() | {"PYTHON": sys.executable, "OUTPUT": str(output)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{script}.sh ended with {done.returncode}: {done.stdout[-6000:]}"


def command_on_gpus(recipe: str, script: str, gpus: int, output: Path, **files: str) -> tuple[str, list[str]]:
    """Returns the last program that a script starts on 8 or 64 GPUs, and its flags with those of --config."""
    from megatron_smar import runtime

    runtime.install()
    from megatron_smar.config.run_file import expand

    recorder, record = output / "recorder.sh", output / f"{script}-{gpus}.record"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    place = {"NODE_RANK": "0", "MASTER_ADDR": "localhost"} if gpus > 8 else {}
    recording = {"PYTHON": str(recorder), "RECORD": str(record)}
    run_script(recipe, script, output, "--gpus", str(gpus), **recording, **place, **files)
    words = record.read_bytes().decode().split("\0")[:-1]
    program, *flags = words[words.index("--") + 1 :]  # after tools/launch.py and its options
    return program, expand(flags)
