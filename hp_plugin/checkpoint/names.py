"""Megatron-LM's names of checkpoints in a folder."""

from __future__ import annotations

from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What a tracker says, and a folder is called, where weights were released without an iteration."""


def checkpoint_folder(path: Path, word: str) -> Path | None:
    """The checkpoint under `path` that a tracker with this word names; None if it says no iteration."""
    if word == RELEASE:
        return path / RELEASE
    return iteration_folder(path, int(word)) if word.isascii() and word.isdecimal() else None


def iteration_folder(path: Path, iteration: int) -> Path:
    """The folder of an iteration."""
    return path / f"iter_{iteration:07d}"
