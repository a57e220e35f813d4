"""One run writes to a folder: refused while its owner is alive, taken over when it is dead."""

import json
import multiprocessing
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hp_plugin.training.checkpoints import lock
from hp_plugin.training.checkpoints.lock import NAME, FolderInUseError, FolderLock, Owner

ROOT = Path(__file__).parents[2]
HOLD = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from hp_plugin.training.checkpoints.lock import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(100)
"""


def write(folder: Path, owner: Owner) -> None:
    (folder / NAME).write_text(json.dumps(asdict(owner)))


def test_a_living_owner_is_named_and_a_dead_one_replaced(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "taken\n"
            with pytest.raises(FolderInUseError, match=f"is written to by process {other.pid} on ") as refusal:
                FolderLock(tmp_path).take()
            assert str(tmp_path / NAME) in str(refusal.value) and "\n" not in str(refusal.value)
        finally:
            other.send_signal(signal.SIGKILL)
        # Not waited for yet: a zombie does not write either.
        for _ in range(100):
            if lock.process_ticks(other.pid) is None:
                break
            time.sleep(0.05)
        FolderLock(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]


def test_a_process_may_take_its_own_again_and_give_it_back(tmp_path: Path) -> None:
    held = FolderLock(tmp_path / "new")
    held.take()
    FolderLock(tmp_path / "new").take()
    held.sign()
    held.release()
    assert not list((tmp_path / "new").iterdir())
    held.release()


def test_a_number_that_was_given_anew_is_not_the_owner(tmp_path: Path) -> None:
    write(tmp_path, replace(Owner.this_process(), ticks=1, pid=os.getppid()))
    FolderLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "{}", "[]", "garbled", '{"host": 3}', "\x00" * 100])
def test_a_lock_that_nobody_can_read_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    FolderLock(tmp_path).take()


def test_another_machine_is_alive_while_it_gives_signs(tmp_path: Path) -> None:
    elsewhere = replace(Owner.this_process(), host="elsewhere")
    write(tmp_path, elsewhere)
    with pytest.raises(FolderInUseError, match="on elsewhere, there since"):
        FolderLock(tmp_path).take()
    os.utime(tmp_path / NAME, (time.time() - 31 * 60,) * 2)
    FolderLock(tmp_path).take()


def test_a_restart_of_the_same_job_takes_over_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    write(tmp_path, replace(Owner.this_process(), host="elsewhere"))
    FolderLock(tmp_path).take()
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    write(tmp_path, replace(Owner.this_process(), host="elsewhere", job="slurm 12"))
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path).take()


def test_an_owner_notices_that_it_is_not_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = FolderLock(tmp_path)
    held.take()
    os.utime(tmp_path / NAME, (0, 0))
    monkeypatch.setattr(lock, "_SIGN_S", 0)
    held.sign()
    assert (tmp_path / NAME).stat().st_mtime > time.time() - 60
    write(tmp_path, replace(Owner.this_process(), host="elsewhere"))
    with pytest.raises(FolderInUseError, match="taken over by process"):
        held.sign()
    held.release()
    assert (tmp_path / NAME).exists()


def test_it_works_where_files_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", unable)
    held = FolderLock(tmp_path)
    held.take()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_whoever_takes_it_is_waited_for(tmp_path: Path) -> None:
    other = threading.Thread(target=FolderLock(tmp_path).take)
    with lock._one_at_a_time(tmp_path):
        other.start()
        time.sleep(0.1)
        assert not (tmp_path / NAME).exists()
    other.join()
    assert (tmp_path / NAME).exists()


def test_it_works_where_folders_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(lock.fcntl, "flock", unable)
    write(tmp_path, replace(Owner.this_process(), ticks=1))
    FolderLock(tmp_path).take()
    with pytest.raises(FolderInUseError, match="is written to by"):
        write(tmp_path, replace(Owner.this_process(), pid=os.getppid(), ticks=lock.process_ticks(os.getppid()) or 0))
        FolderLock(tmp_path).take()


def contend(folder: Path, meeting: "multiprocessing.synchronize.Barrier", taken: "multiprocessing.Queue[int]") -> None:
    read, delays = lock._read, random.Random(os.getpid())

    def slowly(path: Path) -> Owner | None:
        found = read(path)
        time.sleep(0.004 * delays.random())
        return found

    lock._read = slowly  # in this process alone
    meeting.wait(60)
    try:
        FolderLock(folder).take()
        taken.put(os.getpid())
    except FolderInUseError:
        taken.put(0)
    meeting.wait(60)  # alive until all have tried


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write(folder, replace(Owner.this_process(), ticks=1))
        taken, meeting = context.Queue(), context.Barrier(6)
        tries = [context.Process(target=contend, args=(folder, meeting, taken)) for _ in range(6)]
        for process in tries:
            process.start()
        found = [taken.get(timeout=30) for _ in tries]
        for process in tries:
            process.join(30)
        (owner,) = (pid for pid in found if pid)
        assert json.loads((folder / NAME).read_text())["pid"] == owner
