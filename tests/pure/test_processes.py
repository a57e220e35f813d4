"""Processes end with those who started them, and interrupts in one line: tried on interpreters without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")

CHILDREN = {
    "forked": "os.fork() or time.sleep(300)",
    "forked by a thread": "t = threading.Thread(target=lambda: os.fork() or time.sleep(300)); t.start(); t.join()",
    "a fork's fork": "os.fork() or (os.fork(), time.sleep(300))",
    "a manager": "kept = multiprocessing.get_context('spawn').Manager().Queue()",
    "spawned": "kept = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(300,)); kept.start()",
    "a manager by a thread": (
        "made = []; make = lambda: made.append(multiprocessing.get_context('spawn').Manager()); "
        "t = threading.Thread(target=make); t.start(); t.join()"
    ),
}


class Family:
    """Interpreters that carry a mark in their environment, which whatever they start inherits."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.folder, self.said = f"family-{uuid.uuid4().hex}", folder, folder / "said"
        (folder / "tmp").mkdir()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, code: str, **environment: str) -> subprocess.Popen[bytes]:
        """Runs code, which says "ready" on stdout, in a session of its own; returns when it has."""
        script = self.folder / "script.py"
        # With a guard, as spawned children import it again.
        body = textwrap.indent(textwrap.dedent(code), "    ")
        script.write_text(
            "import multiprocessing, os, signal, subprocess, sys, threading, time\n"
            f"if __name__ == '__main__':\n{body}\n    print('ready', flush=True)\n    time.sleep(300)\n"
        )
        # Python 3.12 warns of every fork beside threads, of which ranks have many anyway.
        own = {
            "PYTHONPATH": str(ROOT),
            "MARK": self.mark,
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONWARNINGS": "ignore",
        }
        with self.said.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, str(script)],
                env=os.environ | own | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        wait_until(lambda: b"ready" in self.said.read_bytes() or process.poll() is not None)
        assert process.poll() is None, self.said.read_text()
        return process

    def members(self) -> list[int]:
        """Who is alive."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                environment = (entry / "environ").read_bytes() if entry.name.isdecimal() else b""
                if self.mark.encode() in environment and ") Z " not in (entry / "stat").read_text():
                    found.append(int(entry.name))
        return found


def wait_until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not there() and time.monotonic() < until:
        time.sleep(0.02)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    made = Family(tmp_path)
    yield made
    for pid in made.members():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in made.started:
        process.wait()


@pytest.mark.parametrize("child", CHILDREN)
def test_children_end_with_a_killed_rank_and_leave_nothing(family: Family, child: str) -> None:
    rank = family.start(
        f"""
        from hp_plugin.processes.lifetime import tie_children
        tie_children()
        tie_children()
        {CHILDREN[child]}
        """
    )
    assert len(family.members()) > 1
    rank.kill()
    rank.wait()
    wait_until(lambda: not family.members(), 20)
    assert family.members() == []
    assert list((family.folder / "tmp").iterdir()) == []


def test_what_is_tied_still_works(family: Family) -> None:
    family.start(
        """
        from hp_plugin.processes.lifetime import tie_children
        tie_children()
        for method in ("spawn", "fork", "forkserver"):
            context = multiprocessing.get_context(method)
            with context.Pool(2) as pool:
                assert pool.map(abs, [-1, 2]) == [1, 2]
        with multiprocessing.Manager() as manager:
            queue = manager.Queue()
            queue.put(3)
            assert queue.get() == 3
        """
    )


LAUNCHER = """
child = "import time; import hp_plugin.processes.lifetime as l; l.end_with_launcher(); print('rea'+'dy', flush=True)"
kept = subprocess.Popen({words}, start_new_session=True)
time.sleep(300)
"""
CHILD = "child + '; time.sleep(300)'"
ALONE = f"[sys.executable, '-c', {CHILD}]"
BEHIND_A_SHELL = f"['sh', '-c', '\"$0\" -c \"$1\"; true', sys.executable, {CHILD}]"


@pytest.mark.parametrize("words", [ALONE, BEHIND_A_SHELL])
def test_a_rank_ends_with_its_launcher(family: Family, words: str) -> None:
    launcher = family.start(LAUNCHER.format(words=words), TORCHELASTIC_RUN_ID="x")
    assert len(family.members()) == (2 if words == ALONE else 3)
    launcher.kill()
    launcher.wait()
    # A shell that started it has nothing left to wait for.
    wait_until(lambda: not family.members(), 20)
    assert family.members() == []


def test_a_run_outlives_the_shell_that_started_it(family: Family) -> None:
    launcher = family.start(LAUNCHER.format(words=ALONE))
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    assert len(family.members()) == 1


def test_a_rank_whose_parent_was_faster_ends_at_once() -> None:
    code = "from hp_plugin.processes import lifetime; lifetime._ask_for_death_signal(2**22 + 1); print('lives')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize("first", [True, False])
def test_an_interrupt_is_one_line_and_status_130(family: Family, first: bool) -> None:
    rank = family.start(
        """
        from hp_plugin.processes.interrupts import say_on_interrupt
        from hp_plugin.processes.rank import begin_rank
        begin_rank()
        say_on_interrupt(lambda: "not saved; the latest checkpoint is iter_0000007")
        reading, writing = os.pipe()
        os.fork() or (os.write(writing, b"!"), time.sleep(300))
        os.read(reading, 1)  # a child that is interrupted while it begins says so
        """,
        RANK="0" if first else "1",
        WORLD_SIZE="2",
    )
    os.killpg(rank.pid, signal.SIGINT)
    assert rank.wait(20) == 130
    words = "script.py: interrupted: not saved; the latest checkpoint is iter_0000007\n" if first else ""
    assert family.said.read_text() == "ready\n" + words
    wait_until(lambda: not family.members(), 20)
    assert family.members() == []


def test_a_rank_that_waits_in_a_library_is_interrupted_all_the_same(family: Family) -> None:
    rank = family.start(
        """
        from hp_plugin.processes import interrupts
        interrupts._GRACE_S = 0.5
        interrupts.take_interrupts()
        print("ready", flush=True)
        import ctypes
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, and signals do not end it
        """
    )
    os.kill(rank.pid, signal.SIGINT)
    assert rank.wait(20) == 130


def test_another_rank_that_is_lost_is_one_line(family: Family) -> None:
    rank = family.start(
        """
        from hp_plugin.processes.interrupts import take_interrupts
        take_interrupts()
        print("ready", flush=True)
        time.sleep(1)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1\\n more")
        """,
        RANK="3",
        WORLD_SIZE="4",
    )
    assert rank.wait(20) == 1
    assert family.said.read_text() == (
        "ready\nscript.py: rank 3 ends, since another rank has: [gloo/transport/tcp/pair.cc:534] Connection closed by "
        "peer [127.0.0.1]:1\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_that_ask_for_a_checkpoint_are_noted(family: Family, number: signal.Signals) -> None:
    rank = family.start(
        """
        from hp_plugin.processes import interrupts
        from hp_plugin.processes.interrupts import noted_signals
        from hp_plugin.processes.rank import begin_rank
        interrupts._GRACE_S = 0.5
        begin_rank()
        with noted_signals(True) as stop:
            print("ready", flush=True)
            while not stop.signal: time.sleep(0.01)
            time.sleep(0.2)
        print(stop.name, flush=True)
        time.sleep(1)  # longer than a rank that is stuck is given, below
        stop.leave_if_interrupted()
        os._exit(0)
        """
    )
    rank.send_signal(number)
    assert rank.wait(20) == (130 if number == signal.SIGINT else 0)
    assert family.said.read_text() == f"ready\n{number.name}\n"


def test_an_interrupt_a_second_time_is_one_at_once(family: Family) -> None:
    rank = family.start(
        """
        from hp_plugin.processes.interrupts import noted_signals
        from hp_plugin.processes.rank import begin_rank
        begin_rank()
        with noted_signals(True) as stop:
            print("ready", flush=True)
            while not stop.signal: time.sleep(0.01)
            print("noted", flush=True)
            time.sleep(300)
        """
    )
    rank.send_signal(signal.SIGINT)
    wait_until(lambda: b"noted" in family.said.read_bytes())
    rank.send_signal(signal.SIGINT)
    assert rank.wait(20) == 130
    assert "Traceback" not in family.said.read_text()
