# SPDX-License-Identifier: Apache-2.0
"""containers/ against pyproject.toml: the versions that it names go together, and it names no package index."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "containers"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
README = (FOLDER / "README.md").read_text()
TABLE = {
    row[0]: row[1:]
    for row in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")
    )
}
FILES = [path for path in FOLDER.iterdir() if path.is_file()]
INSTRUCTIONS = {"ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def requirement(name: str) -> Requirement:
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["te"]]
    return next(found for found in map(Requirement, wanted) if found.name == name)


def base_images() -> dict[str, str]:
    docker = re.findall(r"^FROM (\S+)$", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    apptainer = re.findall(r"^From: (\S+)$", (FOLDER / "apptainer.def").read_text(), flags=re.MULTILINE)
    return {"Dockerfile": docker[0], "apptainer.def": apptainer[0], "README.md": re.findall(r"`(nvcr\S+)`", README)[0]}


def test_all_files_start_from_one_image_of_a_fixed_version():
    (image,) = set(base_images().values())
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", image)


@pytest.mark.parametrize(
    ("row", "name"),
    [("torch", "torch"), ("Transformer Engine", "transformer-engine"), ("megatron-core", "megatron-core")],
)
def test_the_versions_after_the_installation_are_those_of_pyproject(row, name):
    wanted, installed = requirement(name).specifier, Version(TABLE[row][2])
    assert installed.base_version in wanted, f"{name} {installed} is not in {wanted}: change the image or the range"
    declared = TABLE[row][1] if TABLE[row][1][0] in "<>" else f"=={TABLE[row][1]}"
    assert SpecifierSet(declared.replace(" ", "")) == wanted, f"the table says {declared}, pyproject.toml {wanted}"


def test_python_and_numpy_and_cuda_are_those_of_pyproject():
    assert TABLE["Python"][2] in SpecifierSet(PROJECT["requires-python"])
    assert requirement("numpy").specifier == SpecifierSet(TABLE["numpy"][1].replace(" ", "") + ",<3")
    (core,) = (extra for extra in requirement("transformer-engine").extras if extra.startswith("core-cu"))
    assert TABLE["CUDA"][2].partition(".")[0] == core.removeprefix("core-cu")


def test_the_image_s_own_transformer_engine_is_replaced_where_it_is_another():
    text = (FOLDER / "install.sh").read_text()
    assert Version(TABLE["Transformer Engine"][0]) not in requirement("transformer-engine").specifier
    assert text.index("pip uninstall --yes transformer-engine") < text.index("-e '.[te]'")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_names_no_package_index_and_says_that_it_has_not_run(path):
    text = path.read_text()
    assert not re.search(r"index-url|find-links|pypi\.|--index|download\.pytorch", text)
    if path.suffix != ".dockerignore":
        assert re.search(r"not (built|run)", text, flags=re.IGNORECASE), f"{path.name} has not been run: say so"


def test_the_dockerfile_has_instructions_only_and_copies_what_exists():
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= INSTRUCTIONS
    copied = re.search(r"%files\n(.*?)\n\n", (FOLDER / "apptainer.def").read_text(), flags=re.DOTALL)[1]
    assert all((REPOSITORY / line.split()[0]).exists() for line in copied.splitlines())
    assert (FOLDER / "install.sh").stat().st_mode & 0o111
