"""Checksums beside the shards of a checkpoint: bytes that changed on disk are noticed, and the file is named.

The list is Megatron-Core's own from 0.19 on (`--verify-integrity` writes and reads it there), `integrity.json`. Every
rank computes what it has written, in the background too, and loading shares the work out again.

Source: `megatron.core.dist_checkpointing.validation.save_integrity_manifest` of 0.19, by one rank after the save.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from hp_plugin.checkpoint.reading import BACKEND, INDEX, DamagedFileError, readable
from hp_plugin.upstream.checkpoint_format import COMMON_FILE

LIST = "integrity.json"
_PART = "integrity_of_rank_{}.json"
_ALGORITHM = "sha256"


def write_shard_checksums(folder: Path, rank: int) -> None:
    """Of the shards that this rank has written, by Megatron-Core's names, to a list of its own."""
    _write(folder / _PART.format(rank), _sums(folder.glob(f"__{rank}_*")))


def complete_checksums(folder: Path) -> None:
    """Puts the lists of all ranks together, with the other files of the checkpoint; by one rank, after all others.

    Raises:
        RuntimeError: a shard has no checksum, so the process that wrote it has failed.
    """
    parts = list(folder.glob(_PART.format("*")))
    sums: dict[str, str] = {}
    for part in parts:
        sums |= listed_checksums(folder, part.name)
    missing = sorted(shard.name for shard in folder.glob("__*") if shard.name not in sums)
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


def _sums(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: file_checksum(file) for file in sorted(files)}


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
