"""One run at a time writes to a folder of checkpoints: a file there says which, and a dead run's is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "writing.lock"
_SILENT_S = 30 * 60
"""Seconds without a sign of life after which a run on another machine counts as dead."""
_SIGN_S = 30
"""Seconds between signs of life."""


class FolderInUseError(ValueError):
    """Another run writes checkpoints to the same folder; the message says which, and the ways out."""


@dataclass(frozen=True)
class Owner:
    """The process that writes: its machine, number, and when it was started.

    Args:
        started: of the process, in the machine's ticks since it was booted, and as a date; numbers are given anew.
        job: what the launcher calls the run, the same after a restart; empty without one.
    """

    host: str
    pid: int
    ticks: int
    started: str
    job: str = ""

    @classmethod
    def this_process(cls) -> Owner:
        """The caller."""
        ticks = process_ticks(os.getpid()) or 0
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), os.getpid(), ticks, started, _job())

    @property
    def process(self) -> tuple[str, int, int]:
        """What tells processes apart."""
        return self.host, self.pid, self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, there since {self.started}"


class FolderLock:
    """The lock of one folder, taken by one process of a run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.owner = Owner.this_process()
        self._last_sign = 0.0

    def take(self) -> None:
        """Makes this process the folder's owner.

        Raises:
            FolderInUseError: another one is, and alive as far as can be known.
            OSError: the folder cannot be made or written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f"{NAME}.{self.owner.host}.{self.owner.pid}")
        aside.write_text(json.dumps(asdict(self.owner)) + "\n")
        try:
            with _one_at_a_time(self.path.parent):
                while True:
                    try:
                        _place(aside, self.path)
                        break
                    except FileExistsError:
                        self._take_away_if_dead(aside)
        finally:
            aside.unlink(missing_ok=True)
        self._last_sign = time.monotonic()

    def sign(self) -> None:
        """Shows other machines that this process is alive; to be called again and again.

        Raises:
            FolderInUseError: the folder has another owner by now.
        """
        if time.monotonic() - self._last_sign < _SIGN_S:
            return
        self._last_sign = time.monotonic()
        found = _read(self.path)
        if found is None or found.process != self.owner.process:
            raise FolderInUseError(
                f"--save {self.path.parent} has been taken over by {found or 'someone'}: end one run"
            )
        os.utime(self.path)

    def release(self) -> None:
        """Gives the folder back, if it is still this process's; nothing in a process forked from it."""
        found = _read(self.path)
        if found is not None and found.process == self.owner.process and os.getpid() == self.owner.pid:
            self.path.unlink(missing_ok=True)

    def _take_away_if_dead(self, aside: Path) -> None:
        found = _read(self.path)
        if found is not None and not self._is_dead(found, aside):
            raise FolderInUseError(
                f"--save {self.path.parent} is written to by {found}: wait for it, name another folder, or delete "
                f"{self.path} if that run has ended"
            )
        # By renaming, as of two machines that find it dead only one can; and what the slower takes is not the same.
        taken = aside.with_name(f"{aside.name}.taken")
        try:
            self.path.rename(taken)
        except FileNotFoundError:
            return
        if _read(taken) != found:
            with suppress(FileExistsError):
                _place(taken, self.path)
        taken.unlink(missing_ok=True)

    def _is_dead(self, found: Owner, aside: Path) -> bool:
        if found.host == self.owner.host:
            return found.process == self.owner.process or process_ticks(found.pid) != found.ticks
        if found.job and found.job == self.owner.job:
            return True  # launchers end the ranks of a run before they start it again, maybe elsewhere
        try:  # by the clock of the file system, which machines share
            return aside.stat().st_mtime - self.path.stat().st_mtime > _SILENT_S
        except FileNotFoundError:
            return True


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the block: of one machine, and of others where the file system's locks reach them.

    Without it, while one puts back what it took from a faster one by mistake, a third finds none and is an owner, too.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS cannot lock folders, others nothing at all
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)  # which unlocks


def _place(content: Path, path: Path) -> None:
    """Gives a file a second name, so that it appears with its contents; FileExistsError if the name is taken."""
    try:
        os.link(content, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x") as file:
            file.write(content.read_text())


def _read(path: Path) -> Owner | None:
    """None where there is none, or nothing that this release has written."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def process_ticks(pid: int) -> int | None:
    """When a process of this machine was started; None if there is none, 0 where that is not known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return 0


def _job() -> str:
    elastic = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's word for none
    slurm = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm {slurm}" if slurm else "" if elastic == "none" else f"torchrun {elastic}"
