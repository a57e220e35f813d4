"""However a run ends, by a kill, a signal or a mistake of one rank, no process stays, it says why, nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from hp_plugin.checkpoint.checks import check_files
from hp_plugin.training.checkpoints.folder import CheckpointFolder
from tests.adapters.megatron_lm_runs import COMMON, needs_clone, release_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RUN = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 --lr 1e-2 --seed 1 "
    "--train-iters 100000 --lr-decay-iters 100001 --mock-data --vocab-size 63 --head-dim-parallel 1,2"
)
LINE = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")
# What torchrun says for itself.
TORCHRUN = re.compile(r"^[WE]\d{4} ")


class Run:
    """Two ranks of the reference trainer under torchrun; they and what they start have a mark in their environment."""

    def __init__(self, folder: Path, flags: str, script: str | None = None, restarts: int = 0) -> None:
        started = f"{script} {flags}" if script else f"{ROOT}/examples/pretrain_gpt.py {RUN} {flags}"
        self.mark, self.tmp = f"run-{uuid.uuid4().hex}", folder / "tmp"
        self.log = folder / self.mark
        self.tmp.mkdir(exist_ok=True)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                    *("--monitor-interval", "0.1", "--max-restarts", str(restarts), *started.split()),
                ],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": self.mark, "TMPDIR": str(self.tmp)}
        own |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}  # Megatron-LM asks for it
        return os.environ | own

    def members(self) -> list[psutil.Process]:
        """Processes of this run that are alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [c for c in psutil.Process(self.process.pid).children() if "RANK" in c.environ()]
        return []

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def losses(self) -> dict[int, str]:
        return {int(found[1]): found[2] for found in map(LINE.search, self.text().splitlines()) if found}

    def said_by_ranks(self) -> list[str]:
        """Lines after the last iteration that are not torchrun's own, which ends with a traceback."""
        lines = self.text().splitlines()
        last = max((n for n, line in enumerate(lines) if LINE.search(line)), default=-1)
        after = lines[last + 1 :]
        ends = next((n for n, line in enumerate(after) if line.startswith("Traceback")), len(after))
        assert "torch/distributed/run.py" in "".join(after[ends:]) or ends == len(after), self.text()[-4000:]
        return [line for line in after[:ends] if line and not TORCHRUN.match(line)]

    def wait_for(self, there: Callable[[], bool], seconds: float = 240.0) -> None:
        until = time.monotonic() + seconds
        while not there() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert there(), self.text()[-4000:]

    def leftovers(self) -> list[str]:
        """What there is of it after some seconds: processes, and multiprocessing's folders."""
        until = time.monotonic() + 15
        while self.members() and time.monotonic() < until:
            time.sleep(0.05)
        return [str(process) for process in self.members()] + [str(path) for path in self.tmp.glob("pymp-*")]

    def end(self) -> None:
        for process in self.members():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(flags: str, **more: Any) -> Run:
        runs.append(Run(tmp_path, flags, **more))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def resumes_on_the_curve(
    start: Callable[..., Run], saving: str, folder: CheckpointFolder, before: dict[int, str]
) -> None:
    """A run that goes on from what another left prints what that one printed for the same iterations."""
    latest = folder.latest()
    assert latest is not None
    check_files(latest)
    done = int(latest.name.removeprefix("iter_"))
    again = start(f"--load {folder.path} {saving} --exit-interval {done + 3}")
    assert again.process.wait(240) == 0, again.text()[-4000:]
    after = again.losses()
    assert sorted(after) == [done + 1, done + 2, done + 3]
    shared = before.keys() & after.keys()
    assert all(before[n] == after[n] for n in shared)
    assert again.leftovers() == []


@pytest.mark.parametrize("saving", ["", "--async-save"])
@pytest.mark.parametrize("victim", ["a rank", "torchrun"])
def test_a_kill_leaves_nothing_behind(start: Callable[..., Run], tmp_path: Path, victim: str, saving: str) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    run = start(f"--save {folder.path} --save-interval 1 {saving}")
    run.wait_for(lambda: folder.latest() is not None and len(run.losses()) > 4)
    (run.ranks()[1] if victim == "a rank" else psutil.Process(run.process.pid)).kill()
    run.process.wait(60)
    assert run.leftovers() == []
    # Nobody is left who would go on training in this folder.
    before = run.losses()
    resumes_on_the_curve(start, f"--save {folder.path} --save-interval 1000", folder, before)


def test_restarts_meet_no_ghosts(start: Callable[..., Run], tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    run = start(f"--save {folder.path} --load {folder.path} --save-interval 1 --async-save", restarts=1)
    run.wait_for(lambda: folder.latest() is not None and len(run.losses()) > 4)
    first = {process.pid for process in run.members()} - {run.process.pid}
    run.ranks()[0].kill()
    run.wait_for(lambda: "going on after iteration" in run.text())
    assert not first & {process.pid for process in run.members()}
    run.process.kill()
    run.process.wait()
    assert run.leftovers() == []


def test_an_interrupt_is_one_line(start: Callable[..., Run], tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    run = start(f"--save {folder.path} --save-interval 3 --loss-file {tmp_path}/losses.json")
    run.wait_for(lambda: folder.latest() is not None and len(run.losses()) > 4)
    run.process.send_signal(signal.SIGINT)
    run.process.wait(60)
    assert run.leftovers() == []
    said = [line for line in run.said_by_ranks() if " > saved checkpoint" not in line]
    assert said == [f"pretrain_gpt.py: interrupted: not saved; the latest checkpoint is {folder.latest()}"]
    assert (tmp_path / "losses.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_with_a_checkpoint(start: Callable[..., Run], tmp_path: Path, number: signal.Signals) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    run = start(f"--save {folder.path} --exit-signal-handler")
    run.wait_for(lambda: len(run.losses()) > 4)
    # SIGUSR1 as a batch system sends it, to one rank.
    (run.ranks()[1] if number == signal.SIGUSR1 else psutil.Process(run.process.pid)).send_signal(number)
    status = run.process.wait(60)
    assert status == 0 or number != signal.SIGUSR1, run.text()[-4000:]
    assert run.leftovers() == []
    last = max(run.losses())
    assert folder.latest() == folder.of(last)
    ending = f" > saved checkpoint of iteration {last} to {folder.path}, and ending on {number.name}"
    assert run.said_by_ranks() == [ending]
    resumes_on_the_curve(start, "", folder, run.losses())


def test_one_process_says_130(tmp_path: Path) -> None:
    words = RUN.replace("--head-dim-parallel 1,2", f"--save {tmp_path}/run").split()
    log = tmp_path / "log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            [sys.executable, "-u", "examples/pretrain_gpt.py", *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
    until = time.monotonic() + 120
    while "lm loss" not in log.read_text() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    last = log.read_text().splitlines()[-1]
    assert last == f"pretrain_gpt.py: interrupted: not saved, and there is no checkpoint in {tmp_path}/run yet"


ON_ONE_RANK = """
import os, runpy, sys
sys.argv = ["pretrain_gpt.py", *sys.argv[1:]]
if os.environ["RANK"] == "1":
    sys.argv += {wrong!r}.split()
runpy.run_path({example!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("--lr inf", "--lr must be positive, got inf"),
        ("--hidden-size 17", "--hidden-size 17 is not a multiple of --num-attention-heads 2"),
        ("--data-path nowhere", "give --data-path or --mock-data, not both"),
    ],
)
def test_a_rank_that_refuses_alone_is_heard(start: Callable[..., Run], tmp_path: Path, wrong: str, words: str) -> None:
    script = tmp_path / "on_one_rank.py"
    script.write_text(ON_ONE_RANK.format(wrong=wrong, example=str(ROOT / "examples" / "pretrain_gpt.py")))
    run = start(RUN, script=str(script))
    assert run.process.wait(120) == 1
    assert run.leftovers() == []
    said = run.said_by_ranks()
    assert len(said) == 1 and said[0].startswith(f"pretrain_gpt.py: error: {words}"), run.text()


@pytest.mark.parametrize("failing", [0, 1])
def test_without_torchrun_the_others_do_not_wait(tmp_path: Path, failing: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        meeting = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        runs.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "examples/pretrain_gpt.py",
                    *RUN.split(),
                    *(["--lr", "inf"] if rank == failing else []),
                ],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | meeting,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2]
    assert said[failing] == "pretrain_gpt.py: error: --lr must be positive, got inf\n"
    assert said[1 - failing] == ""


MEGATRON_LM = f"{COMMON} --train-iters 100000 --head-dim-parallel 1,2 --save-interval 2".replace("--train-iters 7", "")


@needs_clone
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_scripts_of_megatron_lm_end_alike(start: Callable[..., Run], tmp_path: Path, number: signal.Signals) -> None:
    tree = release_tree("core_v0.16.1", tmp_path / "tree")
    flags = f"{MEGATRON_LM} --save {tmp_path}/run {'--exit-signal-handler' if number == signal.SIGTERM else ''}"
    run = start(flags, script=f"-m hp_plugin.launch {tree}/pretrain_gpt.py")
    run.wait_for(lambda: len(run.losses()) > 4)
    run.process.send_signal(number)
    run.process.wait(60)
    # Megatron-LM's data loaders have workers, whose (empty) folders of multiprocessing stay where they are killed.
    assert [found for found in run.leftovers() if "pymp-" not in found] == []
    folder = CheckpointFolder(tmp_path / "run")
    if number == signal.SIGTERM:
        latest = folder.latest()
        assert latest is not None and max(run.losses()) == int(latest.name.removeprefix("iter_"))
        check_files(latest)
    if number == signal.SIGINT:
        words = "pretrain_gpt.py: interrupted: what was trained since the last checkpoint is not saved"
        assert [line for line in run.said_by_ranks() if "interrupted" in line or "Error" in line] == [words]
