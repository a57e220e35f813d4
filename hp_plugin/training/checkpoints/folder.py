"""Where checkpoints lie: a folder per iteration that is complete as soon as it has its name, and Megatron's tracker."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hp_plugin.checkpoint.names import RELEASE, TRACKER, checkpoint_folder, iteration_folder
from hp_plugin.checkpoint.reading import DamagedFileError, readable

PARTIAL = ".partial-"
_LONGEST = 20
"""Characters of the longest word that a tracker holds."""


@dataclass(frozen=True)
class CheckpointFolder:
    """`iter_0000010` and its siblings under one path; only one process may write to it at a time.

    A checkpoint grows in `iter_0000010.partial-…`, is renamed when all of it is there, and only then named by the
    tracker: a process may die at any moment.
    """

    path: Path

    def latest(self) -> Path | None:
        """The folder that the tracker names; None where there is no tracker.

        Raises:
            DamagedFileError: the tracker cannot be read, does not hold an iteration, or names a folder that is not
                there.
        """
        tracker = self.path / TRACKER
        if not os.path.lexists(tracker):
            return None
        with readable(tracker) as file:
            word = file.read(_LONGEST + 1).decode().strip()
        folder = checkpoint_folder(self.path, word) if len(word) < _LONGEST else None
        if folder is None:
            wrong = f"holds {word!r} instead of an iteration or {RELEASE!r}"
            raise DamagedFileError(tracker, wrong, "write the number of one that is there into it")
        if not folder.is_dir() and _aside(folder).is_dir():
            return _aside(folder)  # died between the two renames of `complete`
        if not folder.is_dir():
            raise DamagedFileError(
                tracker, f"names {folder.name}, which is not there", "restore it, or write the number of one that is"
            )
        return folder

    def of(self, iteration: int) -> Path:
        """The folder of an iteration, Megatron's name for it."""
        return iteration_folder(self.path, iteration)

    def begin(self, iteration: int) -> Path:
        """A new folder to write this iteration to; what dead runs left half-written goes.

        Its name is new every time: writers that outlived their rank may still be writing to an older one.
        """
        for leftover in self.path.glob(f"iter_*{PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{self.of(iteration).name}{PARTIAL}", dir=self.path))

    def complete(self, partial: Path, iteration: int) -> None:
        """Gives what was written to `partial` its name and makes it the latest; one it replaces is kept until then."""
        folder = self.of(iteration)
        if folder.exists():
            shutil.rmtree(_aside(folder), ignore_errors=True)
            folder.rename(_aside(folder))
        partial.chmod(0o777 & ~_umask())
        partial.rename(folder)
        shutil.rmtree(_aside(folder), ignore_errors=True)
        aside = self.path / f"{TRACKER}.{os.getpid()}"
        with aside.open("w") as tracker:
            tracker.write(str(iteration))
            tracker.flush()
            os.fsync(tracker.fileno())
        aside.replace(self.path / TRACKER)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")
