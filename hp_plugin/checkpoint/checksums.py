"""Checksums beside the shards of a checkpoint: bytes that changed on disk are noticed, and the file is named.

The list is Megatron-Core's own from 0.19 on (`--verify-integrity` writes and reads it there), `integrity.json`. Every
rank computes what it has written, in the background too, and loading shares the work out again.

Source: `megatron.core.dist_checkpointing.validation.save_integrity_manifest` of 0.19, by one rank after the save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from hp_plugin.checkpoint.reading import BACKEND, INDEX, DamagedFileError, readable
from hp_plugin.upstream.checkpoint_format import COMMON_FILE

LIST = "integrity.json"
_PART = "integrity_of_rank_{}.json"
_ALGORITHM = "sha256"
_SHARD = re.compile(r"__(\d+)_")
"""How Megatron-Core's name of a shard begins: with the rank that writes it."""
_FILES_AT_A_TIME = 4


def write_shard_checksums(folder: Path, rank: int) -> None:
    """Of the shards that this rank has written, by Megatron-Core's names, to a list of its own."""
    _write(folder / _PART.format(rank), _sums(folder.glob(f"__{rank}_*")))


def write_with_checksums(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """`write(*args, **kwargs)`, and then `write_shard_checksums`; for the process that writes in the background.

    Whether it wrote all of them is for `complete_checksums` to say.
    """
    write(*args, **kwargs)
    with suppress(OSError):
        write_shard_checksums(folder, rank)


def has_shard_checksums(folder: Path, rank: int) -> bool:
    """Whether a rank's list is there, waiting for the others."""
    return (folder / _PART.format(rank)).is_file()


def forget_shard_checksums(folder: Path, rank: int) -> None:
    """Removes this rank's list, which a run that ended may have left where another now saves."""
    (folder / _PART.format(rank)).unlink(missing_ok=True)


def complete_checksums(folder: Path, ranks: int) -> None:
    """Puts the lists of all ranks together, with the other files of the checkpoint; by one rank, after all others.

    Shards of ranks beyond `ranks` are left from an earlier save, and no part of this checkpoint.

    Raises:
        RuntimeError: a shard has no checksum, so the process that wrote it has failed.
    """
    parts = list(folder.glob(_PART.format("*")))
    sums: dict[str, str] = {}
    for rank in range(ranks):
        sums |= listed_checksums(folder, _PART.format(rank))
    written = (shard.name for shard in folder.glob("__*") if _rank_of(shard) < ranks)
    missing = sorted(name for name in written if name not in sums)
    if missing:
        raise RuntimeError(f"{folder / missing[0]} has no checksum: writing it did not end well")
    others = (folder / name for name in (INDEX, COMMON_FILE, BACKEND))
    write_checksums(folder, sums | _sums(file for file in others if file.is_file()))
    for part in parts:
        part.unlink()


def write_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Writes the list of a folder's files: whole, or not at all."""
    _write(folder / LIST, sums)


def file_checksum(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return _sum(content)


def listed_checksums(folder: Path, name: str = LIST) -> dict[str, str]:
    """By the name of a file, what it should be; empty where a checkpoint has no checksums.

    Raises:
        DamagedFileError: the list is no list.
    """
    path = folder / name
    if not os.path.lexists(path):
        return {}
    with readable(path) as file:
        listed = json.loads(file.read())
    sums = listed.get("files") if isinstance(listed, dict) and listed.get("algorithm") == _ALGORITHM else None
    if not isinstance(sums, dict) or not all(isinstance(word, str) for word in sums.values()):
        raise DamagedFileError(path, f"is no list of {_ALGORITHM} checksums")
    return {file: digest for file, digest in sums.items() if Path(file).name == file}


def verify_checksum(file: Path, expected: str) -> None:
    """Reads a file and compares.

    Raises:
        DamagedFileError: it is missing, unreadable or another.
    """
    with readable(file) as content:
        found = _sum(content)
    if found != expected:
        raise DamagedFileError(file, "has changed since it was written (its SHA-256 is another)")


def _rank_of(shard: Path) -> int:
    found = _SHARD.match(shard.name)
    return 0 if found is None else int(found[1])


def _sums(files: Iterable[Path]) -> dict[str, str]:
    paths = sorted(files)
    # hashlib lets go of the interpreter, and a rank has several files: together they take as long as the largest.
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as threads:
        return {path.name: digest for path, digest in zip(paths, threads.map(file_checksum, paths), strict=True)}


def _write(path: Path, sums: dict[str, str]) -> None:
    aside = path.with_name(f"{path.name}.writing")
    with aside.open("w") as out:
        json.dump({"algorithm": _ALGORITHM, "files": sums}, out, indent=2)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)


def _sum(content: BinaryIO) -> str:
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    while length := content.readinto(buffer):  # type: ignore[attr-defined]  # of every binary file
        digest.update(memoryview(buffer)[:length])
    return digest.hexdigest()
