"""Checksums beside the shards that Megatron-LM's script saves on a grid; never a reason for a save to fail.

Every rank computes those of what it wrote: in the process that writes, if that is in the background, else when all is
written. They are put together before Megatron-LM's tracker names the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hp_plugin.checkpoint.checksums import (
    LIST,
    complete_checksums,
    forget_shard_checksums,
    has_shard_checksums,
    write_shard_checksums,
    write_with_checksums,
)


def with_checksums(save: Callable[[], Any], checkpoint_dir: str) -> Any:
    """`save()`, and checksums of what it writes to a folder; a collective call over the default group.

    Args:
        save: `dist_checkpointing.save` with its arguments.

    Returns:
        What `save` does: None after a save, or the request to be run in the background, which then makes them.
    """
    if "://" in checkpoint_dir:  # a storage that is no file system
        return save()
    folder, rank = Path(checkpoint_dir), dist.get_rank()
    # The list of a checkpoint that is overwritten stays: if this save breaks off, it tells that the files are mixed.
    forget_shard_checksums(folder, rank)
    request = save()
    if request is None:
        _complete(folder)
        return None
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(write_with_checksums, request.async_fn, folder, rank))
    request.add_finalize_fn(partial(_complete, folder))
    return request


def _complete(folder: Path) -> None:
    """A collective call over the default group."""
    rank = dist.get_rank()
    failure: Exception | None = None
    try:
        if not has_shard_checksums(folder, rank):
            write_shard_checksums(folder, rank)
    except OSError as error:
        failure = error
    dist.barrier()
    if rank > 0:
        return
    try:
        complete_checksums(folder, dist.get_world_size())
    except (OSError, RuntimeError, ValueError) as error:
        failure = failure or error
        (folder / LIST).unlink(missing_ok=True)
        print(f"hp_plugin: checkpoint {folder} is saved without checksums: {failure}", flush=True)
