# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's manifest: the size of every file and the SHA-256 of every block of it.

Blocks are hashed independently, so that several threads share a file while it is written, several ranks share a
checkpoint when it is verified, and a sample of the blocks can be verified alone. Megatron 0.19.2 has a manifest too
(--verify-integrity): one hash per file, for which rank 0 reads the whole checkpoint once more after each save.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

NAME = "manifest.json"
SUMS = ".sums"  # suffix of the blocks' hashes of a file that is being written; the manifest takes them in
BLOCK = 1 << 24
SAMPLED = 16  # one block of this many is read in a sampled verification, besides each file's first and last
LOADER = "loader/"  # prefix of the files of the data loader's state, which are in a folder of their own

Verification = Literal["full", "sampled", "none"]


@dataclass(frozen=True)
class FileSums:
    """A file's size and hashes.

    Attributes:
        size: Bytes.
        blocks: SHA-256 of each block of `Manifest.block` bytes, in hexadecimal digits.
    """

    size: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of.

    Attributes:
        block: Bytes of a block.
        files: The files by their names in the checkpoint's folder; those of the data loader's state by `LOADER` and
            their names in the state's folder.
    """

    block: int
    files: Mapping[str, FileSums]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Writes the manifest into a checkpoint's folder."""
        content = {"block": self.block, "files": {n: asdict(f) for n, f in self.files.items()}}
        text = json.dumps({"sha256": _digest(content), **content}, indent=1)
        with (folder / NAME).open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads a checkpoint's manifest; returns None if it has none.

        Raises:
            ValueError: The manifest is damaged.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stored = content.pop("sha256")
            files = {name: FileSums(file["size"], tuple(file["blocks"])) for name, file in content["files"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{NAME} cannot be read ({error})") from error
        if stored != _digest(content):
            raise ValueError(f"{NAME} does not have its own checksum")
        return cls(content["block"], files)

    def size_problems(self, places: Places) -> Iterator[str]:
        """Yields a sentence for each file that is missing or has another size."""
        for name, sums in sorted(self.files.items()):
            if (path := places.path(name)) is None:
                continue
            try:
                size = path.stat().st_size
            except OSError as error:
                yield f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error.strerror}"
                continue
            if size != sums.size:
                yield f"{name} has {size} {'of' if size < sums.size else 'instead of'} {sums.size} bytes"

    def block_problems(
        self, places: Places, how: Verification = "full", share: int = 0, shares: int = 1
    ) -> Iterator[str]:
        """Yields a sentence for each file in which a block differs from its hash, or cannot be read.

        Args:
            places: Where the files are.
            how: Which blocks are read.
            share: Number of the share to read, from 0: several ranks divide the blocks among them.
            shares: Number of shares.
        """
        blocks = [(name, index) for name, index in self._chosen(how) if places.path(name) is not None]
        first, last = (len(blocks) * number // shares for number in (share, share + 1))
        by_file: dict[str, list[int]] = {}
        for name, index in blocks[first:last]:
            by_file.setdefault(name, []).append(index)
        for name, indices in by_file.items():
            path = places.path(name)
            assert path is not None
            try:
                with path.open("rb") as file:
                    bad = next((index for index in indices if not self._matches(file, name, index)), None)
            except OSError as error:
                yield f"{name} cannot be read ({error.strerror or error})"
                continue
            if bad is not None:
                begin = bad * self.block
                yield f"{name} differs from its checksum in bytes {begin} to {begin + self.block}"

    def _chosen(self, how: Verification) -> Iterator[tuple[str, int]]:
        chance = random.Random(_digest({name: asdict(file) for name, file in self.files.items()}))
        for name, sums in sorted(self.files.items()):
            for index in range(len(sums.blocks)):
                at_an_end = index in (0, len(sums.blocks) - 1)
                if how == "full" or (how == "sampled" and (at_an_end or chance.random() < 1 / SAMPLED)):
                    yield name, index

    def _matches(self, file: IO[bytes], name: str, index: int) -> bool:
        file.seek(index * self.block)
        return hashlib.sha256(file.read(self.block)).hexdigest() == self.files[name].blocks[index]


@dataclass(frozen=True)
class Places:
    """Where a checkpoint's files are.

    Attributes:
        checkpoint: The checkpoint's folder.
        loader: Folder of the data loader's state of this step; None if that state is not looked at.
    """

    checkpoint: Path
    loader: Path | None = None

    def path(self, name: str) -> Path | None:
        """Returns a file's path; None for a file that is not looked at."""
        if not name.startswith(LOADER):
            return self.checkpoint / name
        return None if self.loader is None else self.loader / name.removeprefix(LOADER)


def collect(places: Places) -> Manifest:
    """Makes the manifest of files that are complete; those without hashes from their writer are read.

    Args:
        places: The folders, with the hashes that `HashingFile` has left; these are deleted.
    """
    files = {}
    for name, path in _files(places):
        sums = path.with_name(path.name + SUMS)
        if sums.exists():
            content = json.loads(sums.read_text(encoding="utf-8"))
            files[name] = FileSums(content["size"], tuple(content["blocks"]))
            if path.stat().st_size != files[name].size:
                raise OSError(f"{name} has {path.stat().st_size} bytes, and {files[name].size} were written")
            sums.unlink()
        else:
            files[name] = sums_of(path)
    return Manifest(BLOCK, files)


def sums_of(path: Path) -> FileSums:
    """Reads a file and returns its size and hashes."""
    size = path.stat().st_size

    def hash_block(begin: int) -> str:
        with path.open("rb") as file:
            file.seek(begin)
            return hashlib.sha256(file.read(BLOCK)).hexdigest()

    with ThreadPoolExecutor(2) as pool:
        return FileSums(size, tuple(pool.map(hash_block, range(0, size, BLOCK))))


def _files(places: Places) -> Iterable[tuple[str, Path]]:
    for prefix, folder in (("", places.checkpoint), (LOADER, places.loader)):
        if folder is None:
            continue
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != NAME and path.suffix != SUMS:
                yield prefix + path.relative_to(folder).as_posix(), path


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class HashingFile:
    """A file opened for writing that hashes its blocks in other threads while they are written.

    On closing it leaves the hashes beside the file, for `collect`: the writer may be another process than the one that
    makes the manifest.

    Args:
        path: The file.
        errors: Receives a sentence when writing fails; Megatron's writer keeps only the class of an error.
    """

    def __init__(self, path: str | os.PathLike[str], errors: list[str]) -> None:
        self._path, self._errors = Path(path), errors
        self._block = bytearray()
        self._size = 0
        self._hashes: list[Future[str]] = []
        self._pool = ThreadPoolExecutor(2)
        self._file = self._attempt(lambda: open(path, "wb"))  # noqa: SIM115  # closed by __exit__

    def write(self, data: Any) -> int:
        """Writes bytes, or any object with a buffer, and returns their number."""
        view = memoryview(data).cast("B")
        written = len(view)
        self._attempt(lambda: self._file.write(view))
        self._size += written
        while len(view):
            part = view[: BLOCK - len(self._block)]
            self._block += part
            view = view[len(part) :]
            if len(self._block) == BLOCK:
                self._end_block()
        return written

    def tell(self) -> int:
        """Returns the position, which is the number of bytes written."""
        return self._size

    def flush(self) -> None:
        """Passes everything to the operating system."""
        self._attempt(self._file.flush)

    def fileno(self) -> int:
        """Returns the file descriptor, after everything was passed to the operating system."""
        self.flush()
        return self._file.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Closes the file; unless an error ended the writing, leaves the hashes beside it."""
        try:
            self._attempt(self._file.close)
            if kind is None:
                if self._block:
                    self._end_block()
                content = {"size": self._size, "blocks": [future.result() for future in self._hashes]}
                sums = self._path.with_name(self._path.name + SUMS)
                self._attempt(lambda: sums.write_text(json.dumps(content), encoding="utf-8"))
        finally:
            self._pool.shutdown()

    def _end_block(self) -> None:
        self._hashes.append(self._pool.submit(lambda block: hashlib.sha256(block).hexdigest(), self._block))
        self._block = bytearray()
        if len(self._hashes) > 4:
            self._hashes[-5].result()  # blocks that wait for their hash stay in memory

    def _attempt(self, operation: Any) -> Any:
        try:
            return operation()
        except OSError as error:
            self._errors.append(f"{self._path.name}: {error.strerror or error}")
            raise
