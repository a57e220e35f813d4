"""Ranks that are killed anywhere, a save included, cost the iterations since the last checkpoint and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hp_plugin.checkpoint.checks import check_files
from hp_plugin.training.checkpoints.folder import CheckpointFolder

ROOT = Path(__file__).parents[2]
ITERATIONS, KILLS, RANKS = 8, 2, 2
RUN = (
    f"--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 2 --lr 1e-2 --seed 1 "
    f"--train-iters {ITERATIONS} --mock-data --vocab-size 63 --head-dim-parallel 1,2"
)
LINE = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")


def launch(flags: str, log: Path) -> subprocess.Popen[bytes]:
    # To a file: orphans of killed ranks would keep a pipe open.
    with log.open("wb") as out:
        return subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(RANKS), "--max-restarts", str(KILLS), "--monitor-interval", "0.1"),
                *("examples/pretrain_gpt.py", *RUN.split(), *flags.split()),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def losses(log: Path) -> list[tuple[int, str]]:
    return [(int(found[1]), found[2]) for found in map(LINE.search, log.read_text().splitlines()) if found]


def ranks_of(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(run.pid).children() if "pretrain_gpt.py" in " ".join(child.cmdline())]
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    log = tmp_path_factory.mktemp("undisturbed") / "log"
    assert launch("", log).wait(200) == 0, log.read_text()[-3000:]
    return dict(losses(log))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("saving", ["", "--async-save"])
def test_killed_ranks_resume_on_the_same_curve(tmp_path: Path, saving: str, undisturbed: dict[int, str]) -> None:
    expected = undisturbed
    assert sorted(expected) == list(range(1, ITERATIONS + 1))
    seed = random.randrange(1 << 30)
    print(f"seed of the kills: {seed}")
    chance = random.Random(seed)
    folders = CheckpointFolder(tmp_path / "run")
    log = tmp_path / "killed.log"
    run = launch(f"--save {folders.path} --load {folders.path} --save-interval 1 {saving}", log)
    seen: set[int] = set()
    killed = 0
    deadline = time.monotonic() + 240
    try:
        while run.poll() is None and time.monotonic() < deadline:
            seen |= {rank.pid for rank in ranks_of(run)}
            before = len(losses(log))
            while killed < KILLS and run.poll() is None and len(losses(log)) == before and time.monotonic() < deadline:
                time.sleep(0.02)
            if killed < KILLS and run.poll() is None:
                # Saves take nearly all of the time between two lines.
                time.sleep(chance.random() * 0.5)
                alive = ranks_of(run)
                if alive:
                    seen |= {rank.pid for rank in alive}
                    with contextlib.suppress(psutil.NoSuchProcess):
                        chance.choice(alive).kill()
                        killed += 1
                    latest = folders.latest()
                    if latest is not None:
                        check_files(latest)
            time.sleep(0.05)
    finally:
        if run.poll() is None:
            run.kill()
        for pid in seen:  # what ranks leave behind is in the session that torchrun gave each of them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
    assert run.returncode == 0, log.read_text()[-3000:]
    assert killed == KILLS
    printed = losses(log)
    assert [number for number, _ in printed][-1] == ITERATIONS
    assert {number for number, _ in printed} == set(expected)
    assert all(loss == expected[number] for number, loss in printed), f"{printed} instead of {expected}"
    assert len(printed) < KILLS * ITERATIONS, "every restart began from the beginning"
    latest = folders.latest()
    assert latest == folders.of(ITERATIONS)
