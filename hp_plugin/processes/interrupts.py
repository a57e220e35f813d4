"""Ctrl-C ends a rank with one line and status 130; signals that ask for a checkpoint are noted until there is one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

INTERRUPTED = 128 + signal.SIGINT
LOST_A_PEER = 1
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What ends a run with a checkpoint under --exit-signal-handler, the first of them as in Megatron-LM."""

_GRACE_S = 10.0  # for a main thread that waits in a collective, below the 30 s after which torchrun kills
_WORDS_OF_LOST_PEERS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed"),
    *("failed to connect to peer", "Connection was likely closed", "remote process exited"),
)

_interrupted = threading.Event()
_last_words: Callable[[], str] = lambda: "not saved, before training began"  # noqa: E731


class Stop:
    """Which signal has asked this process to end after its iteration: 0 for none."""

    signal = 0

    @property
    def name(self) -> str:
        """The signal's name, or nothing."""
        return signal.Signals(self.signal).name if self.signal else ""

    def leave_if_interrupted(self) -> None:
        """Ends the process with the status of an interrupted one, if it was; after other signals it ends as it is."""
        if self.signal == signal.SIGINT:
            leave(INTERRUPTED)


@contextmanager
def noted_signals(wanted: bool) -> Iterator[Stop]:
    """Inside the block, if `wanted`, the first signal that asks to end is noted; Ctrl-C a second time interrupts."""
    stop, before = Stop(), {}

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal and number == signal.SIGINT:
            _interrupt(number, frame)
        stop.signal = stop.signal or number

    if wanted:
        before = {number: signal.signal(number, note) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_interrupts() -> None:
    """From now on a rank that is interrupted, or loses another, ends with a line instead of a traceback.

    The first rank says what is saved; a rank that is stuck in a collective is ended after some seconds.
    """
    sys.excepthook = _end_with_words
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # started in the background: to be left alone
    signal.signal(signal.SIGINT, _interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_if_stuck, args=(reading,), daemon=True).start()


def say_on_interrupt(words: Callable[[], str]) -> None:
    """What the first rank says about what is saved, when it is interrupted."""
    global _last_words
    _last_words = words


def leave(status: int) -> None:
    """Ends the process at once: no destructor may wait for ranks that have gone."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers send it to whole groups, and people twice
    raise KeyboardInterrupt


def _end_if_stuck(reading: int) -> None:
    while True:
        received = os.read(reading, 1)
        if received and received[0] == signal.SIGINT:
            # Python runs the handler only after the main thread has come back from whatever library it is in.
            not_only_noted = signal.getsignal(signal.SIGINT) is _interrupt
            time.sleep(_GRACE_S)
            if _interrupted.is_set() or not_only_noted:
                _say_interrupted()


def _say_interrupted() -> None:
    if os.environ.get("RANK", "0") == "0":
        words = "not saved"
        with suppress(Exception):  # what is on disk may be damaged
            words = _last_words()
        _say(f"interrupted: {words}")
    leave(INTERRUPTED)


def _end_with_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    lost = _lost_a_peer(error)
    if lost:
        _interrupted.wait(1.0)  # the signal that ended the other may be on its way here
    if issubclass(kind, KeyboardInterrupt) or _interrupted.is_set():
        _say_interrupted()
    if lost:
        rank = os.environ.get("RANK", "0")
        _say(f"rank {rank} ends, since another rank has: {_first_line(error)}")
        leave(LOST_A_PEER)
    sys.__excepthook__(kind, error, trace)


def _lost_a_peer(error: BaseException) -> bool:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    text = str(error)
    return not alone and isinstance(error, (RuntimeError, OSError)) and any(w in text for w in _WORDS_OF_LOST_PEERS)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]


def _say(text: str) -> None:
    # Not to sys.stderr, which torch puts a buffer in the place of while it calls the hook it found.
    with suppress(OSError):
        os.write(2, f"{Path(sys.argv[0]).name}: {text}\n".encode())
