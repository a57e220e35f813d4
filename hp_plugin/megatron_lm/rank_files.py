"""Which files of `--ckpt-format torch` Megatron-LM will load, looked through as soon as its flags are known."""

from __future__ import annotations

import argparse
from pathlib import Path

from hp_plugin.checkpoint.names import TRACKER, checkpoint_folder
from hp_plugin.checkpoint.rank_files import check_rank_files


def check_files_to_load(args: argparse.Namespace) -> None:
    """Shares the files out among the ranks, by their numbers alone; nothing for another format or no checkpoint.

    Raises:
        DamagedFileError: names a file that has changed, or whose reading would run code.
    """
    for name in ("load", "pretrained_checkpoint"):  # the second where the first has none yet
        folder = _folder(getattr(args, name, None), getattr(args, "ckpt_step", None))
        if folder is not None:
            return check_rank_files(folder, args.rank, args.world_size, getattr(args, "trust_checkpoint", False))


def _folder(load: str | None, step: int | None) -> Path | None:
    """The checkpoint that Megatron-LM finds in a folder; None where it finds none, which it says itself."""
    if load is None or "://" in load:  # a storage that is no file system
        return None
    try:
        word = (Path(load) / TRACKER).read_text().strip()
    except (OSError, ValueError):
        word = ""
    return checkpoint_folder(Path(load), str(step) if step else word)
