# SPDX-License-Identifier: Apache-2.0
"""Tests that run docs/tutorial.md like its reader: the page's own code blocks, in their order, in one shell."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.launch import ROOT, users_environment

pytestmark = pytest.mark.matrix  # five minutes
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(bash|python)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PHOTOGRAPH = "a cat"  # the answer about the photograph, expected from every program


@dataclass(frozen=True)
class Followed:
    """The results of following the page.

    Attributes:
        folder: Folder where the commands ran, which contains the page's runs/tutorial.
        output: Output of the blocks under each heading, by the number of the heading.
        environment: Environment variables of the shell.
    """

    folder: Path
    output: dict[int, str]
    environment: dict[str, str]

    @property
    def results(self) -> Path:
        return self.folder / "runs" / "tutorial"


def blocks() -> list[tuple[int, str, str, str]]:
    """Returns the page's blocks: (number of the preceding heading, language, kind of block for this test, text)."""
    page = PAGE.read_text(encoding="utf-8")
    found = []
    for block in BLOCK.finditer(page):
        headings = re.findall(r"^## (\d+)\.", page[: block.start()], re.MULTILINE)
        language, kind, text = block.groups(default="")
        found.append((int(headings[-1]) if headings else 0, language, kind, text))
    return found


def script() -> str:
    """Returns all blocks that terminate on their own as one script, which prints the heading of each block."""
    lines = ["set -euo pipefail"]
    for heading, language, kind, text in blocks():
        if not kind:
            lines += [f"echo '=== {heading}'", text if language == "bash" else f"python - <<'BLOCK'\n{text}BLOCK"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Followed:
    """The page, followed in a folder that has the project's programs and no earlier results."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("tools", "examples", "megatron_smar", "pretrain_vlm.py"):
        (folder / name).symlink_to(ROOT / name)
    environment = users_environment()
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "MEGATRON_SMAR_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        ["bash", "-c", script()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        pytest.fail(f"the page hangs:\n{printed[-6000:]}")
    assert process.returncode == 0, f"the page's commands failed:\n{printed[-6000:]}"
    output: dict[int, str] = {}
    for part in printed.split("=== ")[1:]:
        heading, _, text = part.partition("\n")
        output[int(heading)] = output.get(int(heading), "") + text
    return Followed(folder, output, environment)


def logged_steps(text: str) -> list[int]:
    """Returns the numbers of the logged training steps."""
    return [int(number) for number in re.findall(r"iteration +(\d+)/ +\d+", text)]


def test_the_interrupted_stage_resumes_at_the_step_where_it_stopped(followed):
    steps = logged_steps(followed.output[5])
    assert steps == list(range(1, 121)), f"steps were lost or repeated: {steps}"
    assert (followed.results / "stage2" / "latest_checkpointed_iteration.txt").read_text() == "120"


def test_the_model_recognizes_views_that_it_was_not_trained_on(followed):
    results = json.loads((followed.results / "results.json").read_text())
    chance = 1 / 11
    assert results["vqa_accuracy"] > 5 * chance
    assert all(distance > 0 for distance in results["mrd_distance_by_layer"])


def test_chat_and_transformers_give_the_same_answer_about_the_same_photograph(followed):
    answers = [line.strip() for line in (followed.output[9] + followed.output[10]).splitlines()]
    assert answers.count(PHOTOGRAPH) == 3, f"checkpoint, export and transformers answered: {answers}"


def test_the_tensorboard_command_serves_the_run_with_its_mrd_distances(followed):
    [(_, _, _, command)] = [block for block in blocks() if block[2] == "service"]
    port = str(free_port())
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.replace('6006', port)}"],
        cwd=followed.folder,
        env=followed.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://localhost:{port}/data/plugin/scalars/tags"
        tags = {}
        end = time.monotonic() + 60
        while "mrd distance" not in str(tags) and time.monotonic() < end:
            try:
                with urllib.request.urlopen(address, timeout=10) as answer:
                    tags = json.load(answer)
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        assert "mrd distance" in str(tags), f"TensorBoard shows {tags}"
    finally:
        process.terminate()
        process.wait(timeout=30)
