# SPDX-License-Identifier: Apache-2.0
"""Refuses, with one sentence, an environment in which Megatron would fail later and less clearly.

Runs whenever `megatron_smar` is imported, so it only looks at package metadata and files and imports neither torch nor
Megatron nor Transformer Engine.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tomllib
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from pathlib import Path

_TRANSFORMER_ENGINE_PACKAGES = (
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
)
_TRANSFORMER_ENGINE_LIBRARIES = ("libtransformer_engine", "transformer_engine_torch")
ALLOW_UNTESTED = "MEGATRON_SMAR_ALLOW_UNTESTED"
_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")


def check_environment() -> None:
    """Checks that this project can run with the installed packages.

    A complete Transformer Engine on a machine without a GPU passes: `megatron_smar.runtime` decides which kernels to
    use.

    Raises:
        ImportError: torch or megatron-core is missing or outside the tested range, another copy of Megatron comes first
            on the path, an importable `apex` is not a complete NVIDIA apex, or Transformer Engine is half installed.
            The message is one sentence with the fix. With MEGATRON_SMAR_ALLOW_UNTESTED=1 a version outside the tested
            range is only a warning.
    """
    for package in ("torch", "megatron-core"):
        _check_tested_version(package)
    _check_single_megatron()
    _check_apex()
    _check_transformer_engine()


def _check_tested_version(package: str) -> None:
    version = _installed_version(package)
    if version is None:
        raise ImportError(
            f"{package} is not installed for this Python, but megatron_smar needs it: run `make env` in the checkout, "
            "or install megatron_smar with pip."
        )
    # Not imported at the top: `packaging` is installed with the packages whose absence is reported above.
    from packaging.requirements import Requirement
    from packaging.version import Version

    wanted = _declared_requirement(package)
    # NVIDIA's containers have builds such as 2.13.0a0+1234abcd.nv26.08, which count as that release.
    if Version(version).base_version in Requirement(wanted).specifier:
        return
    message = f"{package} {version} is installed, but megatron_smar is tested with {wanted} only"
    if os.environ.get(ALLOW_UNTESTED, "") not in ("", "0"):
        if os.environ.get("RANK", "0") == "0":
            print(f"WARNING: {message} ({ALLOW_UNTESTED} is set).", file=sys.stderr)
        return
    raise ImportError(f"{message}: run `pip install '{wanted}'`, or set {ALLOW_UNTESTED}=1 to continue with a warning.")


def _check_single_megatron() -> None:
    """Refuses a Megatron-LM checkout on PYTHONPATH: it hides the installed megatron-core, unseen by the metadata."""
    version = _installed_version("megatron-core")
    installed = Path(str(metadata.distribution("megatron-core").locate_file("megatron/core/__init__.py")))
    spec = util.find_spec("megatron") and util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"megatron-core {version} is registered as installed, but `megatron.core` cannot be found: "
            f"run `pip install --force-reinstall --no-deps megatron-core=={version}`."
        )
    # An editable installation has no file there that could be hidden.
    if installed.is_file() and not installed.samefile(spec.origin):
        raise ImportError(
            f"`megatron.core` would be imported from {Path(spec.origin).parent}, which hides the installed "
            f"megatron-core {version}: take the directory it is in off PYTHONPATH."
        )


def _check_apex() -> None:
    """Refuses an incomplete or foreign `apex`: Megatron assumes NVIDIA's, and fails in its layer norm or optimizer."""
    spec = util.find_spec("apex")
    if spec is None:
        return
    location = _location(spec)
    from_package = _installed_version("apex") is not None
    removal = "run `pip uninstall apex`" if from_package else "rename it, or take the directory it is in off PYTHONPATH"
    if not (location / "normalization" / "fused_layer_norm.py").is_file():
        raise ImportError(
            f"The module `apex` at {location} is not NVIDIA's apex, but Megatron would use it as such: {removal}."
        )
    missing = [extension for extension in _APEX_EXTENSIONS if util.find_spec(extension) is None]
    if missing:
        raise ImportError(
            f"NVIDIA's apex at {location} was built without its CUDA extensions ({', '.join(missing)} missing), but "
            f"Megatron would use them: build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or {removal}."
        )


def _check_transformer_engine() -> None:
    """Refuses a half-installed Transformer Engine: `import megatron.core` fails with errors other than ImportError."""
    spec = util.find_spec("transformer_engine")
    if spec is None:
        return
    versions = {name: version for name in _TRANSFORMER_ENGINE_PACKAGES if (version := _installed_version(name))}
    problem = _transformer_engine_problem(spec, versions)
    if problem:
        wanted = _declared_requirement("transformer-engine")
        removal = f"run `pip uninstall {' '.join(versions)}`" if versions else "delete that directory"
        raise ImportError(
            f"Transformer Engine at {_location(spec)} is half installed ({problem}), and Megatron fails on importing "
            f"it: either finish with `pip install --no-build-isolation '{wanted}'`, or {removal} to do without."
        )


def _transformer_engine_problem(spec: ModuleSpec, versions: dict[str, str]) -> str | None:
    """Returns what is wrong by the rules of Transformer Engine's own loader (transformer_engine/common/__init__.py)."""
    if "transformer-engine" not in versions:
        return "the package transformer-engine is not installed"
    if len(set(versions.values())) > 1:
        return "versions differ: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    roots = (_location(spec).parent, Path(sysconfig.get_path("purelib")))
    folders = [root / part for root in roots for part in ("", "transformer_engine", "transformer_engine/wheel_lib")]
    missing = [
        f"{library}*.so"
        for library in _TRANSFORMER_ENGINE_LIBRARIES
        if not any(any(folder.glob(f"{library}*.so")) for folder in folders)
    ]
    return f"{' and '.join(missing)} missing" if missing else None


def _location(spec: ModuleSpec) -> Path:
    """Returns the directory of a package or the file of a module."""
    return Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _declared_requirement(package: str) -> str:
    """Returns this project's requirement on a package from pyproject.toml, the only place that has tested ranges."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    declared = (line.partition(";")[0].strip() for line in _declared_requirements())
    return next(line for line in declared if canonicalize_name(Requirement(line).name) == package)


def _declared_requirements() -> list[str]:
    """Returns all requirements with extras: from the checkout's pyproject.toml, else from the package's metadata."""
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        # Next to an installed package, a file of that name belongs to another project.
        if project.get("name") == "megatron_smar":
            return sum(project["optional-dependencies"].values(), project["dependencies"])
    if _installed_version("megatron_smar") is None:
        raise ImportError(
            f"megatron_smar was imported from {Path(__file__).parent}, which is neither its checkout nor an installed "
            "package: install it with `pip install .` in the checkout."
        )
    return metadata.requires("megatron_smar") or []
