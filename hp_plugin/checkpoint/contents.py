"""The shards of a checkpoint, looked through by all ranks together before anything of them is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from hp_plugin.checkpoint.checks import refuse_together
from hp_plugin.checkpoint.checksums import LIST, listed_checksums, verify_checksum
from hp_plugin.checkpoint.reading import DamagedFileError, read_index, read_object


def check_contents(folder: str | Path, trusted: bool = False) -> str | None:
    """Refuses changed bytes and objects that would run code among the shards; a collective call over the default group.

    Each file is read by one rank, each object by one: random states and the like, which torch unpickles as they are.

    Args:
        trusted: reads objects unseen; checksums are compared all the same.

    Returns:
        What a checkpoint without checksums cannot show, to be said; None for one that has them.

    Raises:
        WrongModelError: on all ranks, names the first files.
    """
    complaints: list[str] = []
    try:
        for check in list(_checks(Path(folder), trusted))[dist.get_rank() :: dist.get_world_size()]:
            check()
    except DamagedFileError as damage:
        complaints = [str(damage)]
    refuse_together(complaints, folder, "cannot be loaded")
    if os.path.lexists(Path(folder) / LIST):
        return None
    return f"checkpoint {folder} has no checksums ({LIST}): changed bytes in its shards would go unnoticed"


def _checks(folder: Path, trusted: bool) -> Iterator[Callable[[], None]]:
    sums = listed_checksums(folder)
    for name, expected in sums.items():
        yield partial(verify_checksum, folder / name, expected)
    index = read_index(folder, trusted)
    # Where some files have checksums and a shard has none, it came later.
    names = {place.relative_path for place in index.storage_data.values()} if sums else set()
    for name in sorted(names):
        if name not in sums:
            yield partial(_refuse, folder / name, "has no checksum, and others have")
    if not trusted:
        for piece, place in index.storage_data.items():
            if isinstance(index.state_dict_metadata.get(piece.fqn), BytesStorageMetadata):
                yield partial(read_object, folder / place.relative_path, place)


def _refuse(path: Path, wrong: str) -> None:
    raise DamagedFileError(path, wrong)
