"""A rank ends with its launcher and takes what it started along, however either of them dies.

Linux's parent-death signal does it (prctl(2), PR_SET_PDEATHSIG): a child asks for it itself, before it does anything
else, and looks whether its parent was faster. The kernel sends it when the *thread* that made the child ends, so it is
asked for only by children of main threads. Everywhere else a thread of the child watches the parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing.spawn
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h
_POLL_S = 0.5
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_tied = False
_forking_from: tuple[int, bool] = (0, False)

# What a child runs that is a new Python, before all else. Not killed, but asked to leave, since a server of
# multiprocessing has a folder to remove; whoever does not leave is gone after a while. Ctrl-C is for the parent.
_IN_NEW_PYTHON = """
import os, signal, sys, threading, time
def leave(*_):
    timer = threading.Timer(5, os._exit, (1,)); timer.daemon = True; timer.start()
    sys.exit(1)
def watch():
    while os.getppid() == {parent}: time.sleep({poll})
    os.kill(os.getpid(), signal.SIGHUP)
signal.signal(signal.SIGHUP, leave)
signal.signal(signal.SIGINT, signal.SIG_IGN)
if sys.platform == "linux" and {by_kernel}:
    import ctypes
    ctypes.CDLL(None).prctl({option}, int(signal.SIGHUP), 0, 0, 0)
    if os.getppid() != {parent}: os._exit(1)
else:
    threading.Thread(target=watch, daemon=True).start()
{command}
"""


def end_with_launcher() -> None:
    """Under torchrun, ends this process when torchrun ends; otherwise nothing, since a shell may go before its runs.

    Call it first of all, before torch is imported: what dies earlier is not seen.
    """
    if os.environ.get("TORCHELASTIC_RUN_ID") is None:
        return
    # torchrun gives each of its children a session of its own. What is not the first of it has a script before it,
    # which may live on: it is the first one's parent that counts.
    leader = os.getsid(0)
    if leader == os.getpid():
        end_with_parent()
        return
    launcher = _parent_of(leader)
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def end_with_parent() -> None:
    """Ends this process, by SIGKILL, when its parent ends: at once on Linux, within a second elsewhere."""
    parent = os.getppid()
    if not _ask_for_death_signal(parent):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def tie_children() -> None:
    """From now on what this process starts through `os.fork` and `multiprocessing` ends with it; twice is once.

    Such children also leave Ctrl-C to this process. Programs started by `subprocess` are not touched.
    """
    global _tied
    if _tied:
        return
    _tied = True
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
    original = multiprocessing.spawn.get_command_line

    def get_command_line(**given: Any) -> list[str]:
        words = original(**given)
        if "-c" in words:  # a frozen program has no such word
            at = words.index("-c") + 1
            main = threading.current_thread() is threading.main_thread()
            words[at] = _IN_NEW_PYTHON.format(
                parent=os.getpid(),
                poll=_POLL_S,
                by_kernel=main,
                option=_SET_PARENT_DEATH_SIGNAL,
                command=words[at],
            )
        return words

    multiprocessing.spawn.get_command_line = get_command_line


def _before_fork() -> None:
    global _forking_from
    _forking_from = (os.getpid(), threading.current_thread() is threading.main_thread())


def _after_fork() -> None:
    parent, by_main_thread = _forking_from
    # The parent's own handlers may only take note.
    with suppress(ValueError):  # in a thread that is not the main one of an embedding program
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
    if not by_main_thread or not _ask_for_death_signal(parent):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _ask_for_death_signal(parent: int) -> bool:
    """Whether the kernel will end this process with its parent; ends it here if the parent is gone already."""
    if _LIBC is None or _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:
        _end()
    return True


def _watch(pid: int) -> None:
    """Waits until a process is gone, and ends this one."""
    own_parent = os.getppid() == pid
    with suppress(AttributeError, OSError):  # no Linux, or an old one
        descriptor = os.pidfd_open(pid)
        if not own_parent or os.getppid() == pid:  # else the number may be another process's by now
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            waiting.poll()
        _end()
    while _is_there(pid, own_parent):
        time.sleep(_POLL_S)
    _end()


def _is_there(pid: int, own_parent: bool) -> bool:
    if own_parent:
        return os.getppid() == pid
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _parent_of(pid: int) -> int | None:
    with suppress(OSError, ValueError):
        # The second field is a name in parentheses, which may hold spaces; the fourth is the parent.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
