# SPDX-License-Identifier: Apache-2.0
"""requirements.lock, from which `make env` installs, against pyproject.toml, from which `make lock` writes it."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCK = (REPOSITORY / "requirements.lock").read_text()
LINUX = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}
RENEW = "run `make lock` and commit requirements.lock"


def declared(requirements: list[str]) -> Iterator[Requirement]:
    """What is named, with the project's own extras replaced by what they name."""
    for text in requirements:
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != canonicalize_name(PROJECT["name"]):
            yield requirement
            continue
        for extra in requirement.extras:
            yield from declared(PROJECT["optional-dependencies"][extra])


INSTALLED = list(declared([*PROJECT["dependencies"], "megatron_smar[dev,demo]"]))
BUILD = list(declared(PYPROJECT["build-system"]["requires"]))
ENTRIES = re.findall(r"^\S.*(?:\n[ #].*)*", re.sub(r"\A(#.*\n)+", "", LOCK), flags=re.MULTILINE)


def locked(python: str) -> dict[str, str]:
    """The versions that pip takes from the lock on Linux with this Python."""
    environment = LINUX | {"python_version": python, "python_full_version": f"{python}.0"}
    versions: dict[str, str] = {}
    for entry in ENTRIES:
        requirement = Requirement(entry.partition("\n")[0].removesuffix("\\").strip())
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"requirements.lock has {requirement}, which is not one version: {RENEW}."
        name = canonicalize_name(requirement.name)
        assert name not in versions, f"requirements.lock has two versions of {name} for Python {python}: {RENEW}."
        versions[name] = specifier.version
    return versions


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_lock_has_every_requirement_of_pyproject_in_a_version_that_it_allows(python: str) -> None:
    versions = locked(python)
    environment = LINUX | {"python_version": python, "python_full_version": f"{python}.0"}
    for requirement in INSTALLED + BUILD:
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, (
            f"pyproject.toml requires {requirement}, but requirements.lock lacks it for Python {python}: {RENEW}."
        )
        assert requirement.specifier.contains(version, prereleases=True), (
            f"pyproject.toml requires {requirement}, but requirements.lock has {version}: {RENEW}."
        )


def test_the_lock_has_nothing_for_a_requirement_that_pyproject_no_longer_names() -> None:
    names = {canonicalize_name(requirement.name) for requirement in INSTALLED}
    for entry in ENTRIES:
        name = canonicalize_name(re.split(r"[=\s]", entry)[0])
        assert name in names or "megatron-smar (pyproject.toml)" not in entry, (
            f"requirements.lock has {name} on behalf of pyproject.toml, which does not name it: {RENEW}."
        )


def test_every_version_in_the_lock_has_hashes() -> None:
    assert len(ENTRIES) > 100
    for entry in ENTRIES:
        first = entry.partition("\n")[0].removesuffix("\\").strip()
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), f"requirements.lock has no hash of {first}: {RENEW}."


def test_the_lock_names_no_place_that_packages_come_from() -> None:
    for line in LOCK.splitlines():
        option = re.match(r"\s*(-\w|--(?!hash=))", line)
        assert "://" not in line and " @ " not in line and option is None, (
            f"requirements.lock has the line {line!r}: it may not name an index, an address or a path; {RENEW}."
        )
