"""Starts the ranks of a job on this machine, and hands their steps on as they come."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import connection
from typing import Any

from hp_plugin.generation.decoding import Step
from hp_plugin.generation.job import Job, steps


class RankFailedError(Exception):
    """A rank raised or died; all others have been ended."""


@contextmanager
def started(job: Job) -> Iterator[Iterator[Step]]:
    """The job's steps, without their logits, on as many new processes as it takes, or in this one if that is one.

    However the block is left, no process stays. Ctrl-C reaches this process alone.

    Raises:
        RankFailedError: in one line, the first failure.
    """
    if job.ranks == 1:
        with closing(steps(job)) as own:  # type: ignore[type-var]
            yield own
        return
    # A server that has all of it imported already forks the ranks, and says nothing about what it imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    sys.warnoptions.append("ignore")
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="hp-plugin-generate-") as folder:
        try:
            for rank in range(job.ranks):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(job, rank, theirs, f"{folder}/store"), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            sys.warnoptions.remove("ignore")
            yield _received(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _received(pipes: list[connection.Connection]) -> Iterator[Step]:
    """What the first rank sends, until the end or until any of them fails."""
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in connection.wait(open_pipes):
            assert isinstance(pipe, connection.Connection)
            rank = pipes.index(pipe)
            try:
                message = pipe.recv()
            except EOFError:
                ended = "was ended (often the kernel's answer to a lack of memory)"
                raise RankFailedError(f"rank {rank} {ended}") from None
            if isinstance(message, str):
                raise RankFailedError(f"rank {rank} failed: {message}")
            if message is None:
                open_pipes.remove(pipe)
            else:
                yield message


def _rank(job: Job, rank: int, pipe: connection.Connection, store: str) -> None:
    """One rank: joins the others at the store and runs the job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that started us, which then ends us
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    import torch.distributed as dist

    from hp_plugin.training.distributed import prepare_device

    try:
        os.environ["LOCAL_RANK"] = str(rank)
        prepare_device()
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(1)
        meeting = dist.FileStore(store, job.ranks)
        dist.init_process_group("nccl" if cuda else "gloo", store=meeting, rank=rank, world_size=job.ranks)
        for step in steps(job):
            if rank == 0:
                pipe.send(Step(step.tokens, step.seconds, step.prompt))
        pipe.send(None)
    except BaseException as failure:
        pipe.send(" ".join(str(failure).split()) or type(failure).__name__)


def _die_with(sentinel: int) -> None:
    """Ends this process when the one that started it ends, even if it was killed and this rank waits for others."""
    connection.wait([sentinel])
    os._exit(1)
