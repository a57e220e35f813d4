"""Saves and loads that fail, in one line: a full disk says that it is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from hp_plugin.checkpoint.checks import WrongModelError
from hp_plugin.checkpoint.reading import WAY_OUT

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_BYTES = 2**20
"""Free bytes below which a writer that does not say why it failed has failed for want of room: torch's says nothing."""


class NotSavedError(RuntimeError):
    """A checkpoint could not be written; the message says why and what is left."""


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """What fails within it is a save to a folder of --save.

    Raises:
        NotSavedError: names the folder, why, and that earlier checkpoints are as they were.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        raise NotSavedError(
            f"cannot save a checkpoint to {folder}: {_why(folder, error)}; earlier checkpoints there are complete"
        ) from error


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """What Megatron-Core cannot read within it is a shard of this checkpoint, of which it says no more.

    Raises:
        WrongModelError: names the folder and the error.
    """
    try:
        yield
    except CheckpointException as error:
        raise WrongModelError(
            f"a shard of checkpoint {folder} cannot be read ({_last_line(error)}): {WAY_OUT}"
        ) from error


def _why(folder: Path, error: BaseException) -> str:
    errors = list(_chain(error))
    numbers = {found.errno for found in errors if isinstance(found, OSError)}
    if numbers & _FULL or (not numbers and _free(folder) < _FULL_BYTES):
        return f"the disk is full, {_free(folder)} bytes are free: make room, or save elsewhere"
    named = next((found for found in errors if isinstance(found, OSError) and found.strerror), None)
    return _last_line(error) if named is None else f"{named.strerror} ({named.filename or folder})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    yield error
    for inner in (error.__cause__, error.__context__):
        if inner is not None:
            yield from _chain(inner)
    if isinstance(error, CheckpointException):
        for inner, _ in error.failures.values():
            yield from _chain(inner)


def _free(folder: Path) -> int:
    existing = next((place for place in (folder, *folder.parents) if place.is_dir()), Path(os.sep))
    return shutil.disk_usage(existing).free


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
