# SPDX-License-Identifier: Apache-2.0
"""Tests of the import guard: `import megatron_smar` in a fresh interpreter, with fake packages installed."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
TORCH, MEGATRON = (next(r for r in REQUIREMENTS if r.startswith(name)) for name in ("torch", "megatron-core"))
TE_FAMILY = ("transformer_engine", "transformer_engine_torch", "transformer_engine_cu13")
TE_LIBRARIES = ("libtransformer_engine.so", "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so")


def add_distribution(site: Path, name: str, version: str, *lines: str) -> None:
    directory = site / f"{name}-{version}.dist-info"
    directory.mkdir(parents=True)
    header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines]
    (directory / "METADATA").write_text("\n".join(header) + "\n")


def add_file(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run_import(*path: Path, flags: tuple[str, ...] = (), after: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path[:0] = {[str(p) for p in path]}; import megatron_smar; {after}"
    command = [sys.executable, *flags, "-c", program]
    return subprocess.run(command, cwd=path[0], capture_output=True, text=True, timeout=60)


def refusal(*path: Path, flags: tuple[str, ...] = ()) -> str:
    """Returns the sentence with which the import is refused; fails unless it is exactly one sentence."""
    result = run_import(*path, flags=flags)
    assert result.returncode == 1, "the import was accepted"
    _, separator, message = result.stderr.rstrip("\n").rpartition("\nImportError: ")
    assert separator, result.stderr
    assert "\n" not in message and message.endswith(".") and ". " not in message, message
    return message


def accept(*path: Path) -> None:
    result = run_import(*path)
    assert result.returncode == 0 and result.stderr == "", result.stderr


def test_guard_imports_no_heavy_package(tmp_path: Path) -> None:
    heavy = "{'torch', 'megatron.core', 'transformers', 'transformer_engine'}"
    result = run_import(tmp_path, REPOSITORY, after=f"print({heavy} & set(sys.modules))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "set()", "")


@pytest.mark.parametrize(
    ("name", "version", "wanted"),
    [("torch", "2.9.0", TORCH), ("torch", "3.0.0+cu140", TORCH), ("megatron_core", "0.16.1", MEGATRON)],
)
def test_untested_version_is_refused(tmp_path: Path, name: str, version: str, wanted: str) -> None:
    add_distribution(tmp_path, name, version)
    message = refusal(tmp_path, REPOSITORY)
    assert f"{name.replace('_', '-')} {version} is installed" in message
    assert f"`pip install '{wanted}'`" in message


def test_build_of_nvidias_container_counts_as_its_release(tmp_path: Path) -> None:
    add_distribution(tmp_path, "torch", "2.13.0a0+1234abcd.nv26.08")
    accept(tmp_path, REPOSITORY)


def test_missing_torch_is_named_with_the_fix(tmp_path: Path) -> None:
    message = refusal(tmp_path, REPOSITORY, flags=("-S",))
    assert message.startswith("torch is not installed") and "`make env`" in message


def test_tested_range_comes_from_the_metadata_without_a_checkout(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "megatron_smar", tmp_path / "megatron_smar")
    add_file(tmp_path / "pyproject.toml", '[project]\nname = "another"\ndependencies = ["torch==1.0"]\n')
    add_distribution(tmp_path, "megatron_smar", "0.1.0", "Requires-Dist: torch<100,>=99")
    assert "tested with torch<100,>=99 only" in refusal(tmp_path)


def test_second_megatron_on_the_path_is_refused(tmp_path: Path) -> None:
    add_file(tmp_path / "megatron" / "core" / "__init__.py", "raise RuntimeError('must not be imported')\n")
    message = refusal(tmp_path, REPOSITORY)
    assert str(tmp_path / "megatron" / "core") in message and "PYTHONPATH" in message


def test_index_package_apex_is_refused(tmp_path: Path) -> None:
    add_file(tmp_path / "apex" / "__init__.py", "raise RuntimeError('must not be imported')\n")
    add_distribution(tmp_path, "apex", "0.9.10.dev0")
    message = refusal(tmp_path, REPOSITORY)
    assert str(tmp_path / "apex") in message and "`pip uninstall apex`" in message


@pytest.mark.parametrize("file", ["apex.py", "apex/notes.txt"])
def test_stray_apex_file_or_directory_is_refused(tmp_path: Path, file: str) -> None:
    add_file(tmp_path / file)
    message = refusal(tmp_path, REPOSITORY)
    assert str(tmp_path / "apex") in message and "rename it" in message and "pip uninstall" not in message


def test_nvidia_apex_without_its_extensions_is_refused_and_with_them_accepted(tmp_path: Path) -> None:
    add_file(tmp_path / "apex" / "__init__.py")
    add_file(tmp_path / "apex" / "normalization" / "fused_layer_norm.py")
    add_file(tmp_path / "amp_C.py")
    assert "(fused_layer_norm_cuda missing)" in refusal(tmp_path, REPOSITORY)
    add_file(tmp_path / "fused_layer_norm_cuda.py")
    accept(tmp_path, REPOSITORY)


def add_transformer_engine(site: Path, packages: tuple[str, ...], libraries: tuple[str, ...]) -> None:
    add_file(site / "transformer_engine" / "__init__.py", "raise RuntimeError('must not be imported')\n")
    for name in packages:
        add_distribution(site, name, "2.20.2")
    for library in libraries:
        add_file(site / "transformer_engine" / "wheel_lib" / library)


@pytest.mark.parametrize(
    ("packages", "libraries", "problem"),
    [
        (TE_FAMILY[:1], (), "libtransformer_engine*.so and transformer_engine_torch*.so missing"),
        (TE_FAMILY[::2], TE_LIBRARIES[:1], "(transformer_engine_torch*.so missing)"),
        (TE_FAMILY[:2], TE_LIBRARIES[1:], "(libtransformer_engine*.so missing)"),
    ],
    ids=["meta package only", "no torch part", "no core library"],
)
def test_half_installed_transformer_engine_is_refused(
    tmp_path: Path, packages: tuple[str, ...], libraries: tuple[str, ...], problem: str
) -> None:
    add_transformer_engine(tmp_path, packages, libraries)
    message = refusal(tmp_path, REPOSITORY)
    assert problem in message
    assert "`pip install --no-build-isolation 'transformer-engine[core-cu13,pytorch]==2.20.2'`" in message
    assert f"`pip uninstall {' '.join(packages)}`".replace("_", "-") in message


def test_transformer_engine_of_mixed_versions_is_refused(tmp_path: Path) -> None:
    add_transformer_engine(tmp_path, TE_FAMILY[:2], TE_LIBRARIES)
    add_distribution(tmp_path, "transformer_engine_cu13", "2.19.0")
    assert "versions differ" in refusal(tmp_path, REPOSITORY)


def test_leftover_transformer_engine_directory_is_refused(tmp_path: Path) -> None:
    add_file(tmp_path / "transformer_engine" / "wheel_lib" / TE_LIBRARIES[0])
    message = refusal(tmp_path, REPOSITORY)
    assert str(tmp_path / "transformer_engine") in message and "delete that directory" in message


@pytest.mark.parametrize("folder", ["", "transformer_engine", "transformer_engine/wheel_lib"])
def test_complete_transformer_engine_is_accepted_wherever_its_libraries_are(tmp_path: Path, folder: str) -> None:
    add_transformer_engine(tmp_path, TE_FAMILY, ())
    for library in TE_LIBRARIES:
        add_file(tmp_path / folder / library)
    accept(tmp_path, REPOSITORY)


def test_metadata_without_the_transformer_engine_module_is_accepted(tmp_path: Path) -> None:
    add_distribution(tmp_path, "transformer_engine", "2.20.2")
    accept(tmp_path, REPOSITORY)
