"""Files of `--ckpt-format torch`, one per rank, looked through before any of them is loaded; needs no process group."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch

from hp_plugin.checkpoint.reading import DamagedFileError, readable, unpickled

_FILES = "mp_rank_*/*.pt"
_AT_A_TIME = 2**20


@lru_cache(maxsize=8)  # where arguments are taken from a checkpoint, it is asked for twice
def check_rank_files(folder: Path, rank: int, ranks: int, trusted: bool = False) -> None:
    """Refuses changed bytes and files whose reading would run code; nothing for a checkpoint of another format.

    Each file is read by one rank of those that call it, not held in memory.

    Args:
        rank: the caller's of `ranks`.
        trusted: reads no pickle; bytes are compared all the same, with the sums that torch keeps in the file.

    Raises:
        DamagedFileError: names the first such file among the caller's.
    """
    for path in sorted(folder.glob(_FILES))[rank::ranks]:
        with readable(path) as file:
            if zipfile.is_zipfile(file) or not trusted:
                _check_bytes(path, file)
            if not trusted:
                _check_names(path, file)


def _check_bytes(path: Path, file: BinaryIO) -> None:
    """Compares the CRC-32 that torch writes beside every tensor, and does not look at when it reads."""
    with zipfile.ZipFile(file) as records:
        for record in records.infolist():
            try:
                with records.open(record) as content:
                    while content.read(_AT_A_TIME):
                        pass
            except zipfile.BadZipFile:
                raise DamagedFileError(path, f"has changed since it was written (in {record.filename})") from None


def _check_names(path: Path, file: BinaryIO) -> None:
    with suppress(Exception):
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # which leaves tensors on disk
        return
    file.seek(0)
    unpickled(path, file)  # says what is wrong
