"""Where checkpoints lie: a folder per iteration that is complete as soon as it has its name, and Megatron's tracker."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


@dataclass(frozen=True)
class CheckpointFolder:
    """`iter_0000010` and its siblings under one path; only one process may write to it at a time.

    A checkpoint grows in `iter_0000010.partial`, is renamed when all of it is there, and only then named by the
    tracker: a process may die at any moment.
    """

    path: Path

    def latest(self) -> Path | None:
        """The folder that the tracker names; None where there is no tracker.

        Raises:
            ValueError: the tracker does not hold an iteration, or names a folder that is not there.
        """
        tracker = self.path / TRACKER
        if not tracker.is_file():
            return None
        word = tracker.read_text().strip()
        if word != RELEASE and not word.isdecimal():
            raise ValueError(f"{tracker} holds {word!r} instead of an iteration or {RELEASE!r}")
        folder = self.path / RELEASE if word == RELEASE else self.of(int(word))
        if not folder.is_dir() and _aside(folder).is_dir():
            return _aside(folder)  # died between the two renames of `complete`
        if not folder.is_dir():
            raise ValueError(f"{tracker} names {folder}, which does not exist: was it moved or deleted?")
        return folder

    def of(self, iteration: int) -> Path:
        """The folder of an iteration, Megatron's name for it."""
        return self.path / f"iter_{iteration:07d}"

    def partial(self, iteration: int) -> Path:
        """The folder that this iteration is written to."""
        folder = self.of(iteration)
        return folder.with_name(folder.name + ".partial")

    def begin(self, iteration: int) -> None:
        """Makes that folder, empty."""
        shutil.rmtree(self.partial(iteration), ignore_errors=True)
        self.partial(iteration).mkdir(parents=True)

    def complete(self, iteration: int) -> None:
        """Gives what was written its name and makes it the latest; one it replaces is loadable until then."""
        folder = self.of(iteration)
        if folder.exists():
            shutil.rmtree(_aside(folder), ignore_errors=True)
            folder.rename(_aside(folder))
        self.partial(iteration).rename(folder)
        shutil.rmtree(_aside(folder), ignore_errors=True)
        aside = self.path / f"{TRACKER}.{os.getpid()}"
        with aside.open("w") as tracker:
            tracker.write(str(iteration))
            tracker.flush()
            os.fsync(tracker.fileno())
        aside.replace(self.path / TRACKER)


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")
