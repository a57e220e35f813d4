"""Runs a test body on every rank of a gloo world, on pools of processes that live as long as the session.

One process and one pipe per rank, one pool per world size, forked from a server that has torch and
Megatron-Core loaded already. Rank r of a pool is the same process for every job, and the default process
group stays; what a job adds to it (groups, Megatron's globals, random states) is gone before the next job.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil

PRELOADED = [
    "numpy",
    "torch",
    "torch.distributed",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
]
# After the first failure the others get this long to fail by themselves, so that their tracebacks show too.
GRACE_S = 2.0
# A gloo group has a thread and a few open files for as long as anything holds it, and DeepSpeed's engines hold theirs
# for good: some ten of them, far from what a process may open, before ranks are replaced and import it all again.
MAX_THREADS = 200


class RankError(Exception):
    """A body failed, died or hung on some rank; the message shows every rank's traceback."""


class Ranks:
    """The pools of one test session, each started when its world size is first asked for."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._pools: dict[int, _Pool] = {}

    def run(self, world_size: int, body: Callable[..., Any], *args: Any, timeout: float = 400.0) -> list[Any]:
        """Return `body(*args)` of every rank, in rank order; `body` is a function of a test module.

        `timeout` is in seconds. Warnings are filtered on the ranks as in the calling test. Raises
        `RankError` if a rank raises, dies or does not finish in time; that pool is killed, and the next call
        starts another.
        """
        pool = self._pools.get(world_size) or _Pool(world_size, self._context)
        self._pools[world_size] = pool
        try:
            results = pool.run(body, args, timeout)
        except BaseException:
            # Ranks in the middle of a job (also after Ctrl-C) can only be discarded.
            del self._pools[world_size]
            pool.kill()
            raise
        if pool.threads() > MAX_THREADS:
            del self._pools[world_size]
            pool.kill()
        return results

    def close(self) -> None:
        """End every pool."""
        while self._pools:
            self._pools.popitem()[1].kill()


class _Pool:
    """The processes of one world size, seen from the test session."""

    def __init__(self, world_size: int, context: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._pipes: list[connection.Connection] = []
        self._processes: list[Any] = []
        # One thread each, also in libraries that read this only once, while the server loads them.
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, world_size, theirs, self._folder), daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads

    def run(self, body: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        # Plain pickle: torch's own reducers would send tensors as shared memory that outlives the job.
        job = pickle.dumps((list(sys.path), list(warnings.filters), pickle.dumps((body, args))))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead rank is reported below
                pipe.send_bytes(job)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        start = time.monotonic()
        deadline = start + timeout
        while len(results) + len(failures) < len(self._pipes):
            waiting = [r for r in range(len(self._pipes)) if r not in results and r not in failures]
            ready = connection.wait([self._pipes[r] for r in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in waiting:
                if self._pipes[rank] not in ready:
                    continue
                try:
                    ok, value = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(GRACE_S)
                    ok, value = False, f"died with exit code {self._processes[rank].exitcode}\n{self._stack(rank)}"
                (results if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(results) == len(self._pipes):
            return [results[rank] for rank in range(len(self._pipes))]
        hung = [r for r in range(len(self._pipes)) if r not in results and r not in failures]
        waited = time.monotonic() - start
        raise RankError(self._report(body, failures, hung, waited))

    def _report(self, body: Callable[..., Any], failures: dict[int, str], hung: list[int], waited: float) -> str:
        for rank in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5 if hung else 0.0)  # the signal handler writes the stack, nobody tells when it is done
        head = f"{body.__module__}.{body.__qualname__} on {len(self._pipes)} ranks: "
        head += f"failed on {sorted(failures)}, still running on {hung} after {waited:.1f} s\n"
        parts = [f"--- rank {rank} failed ---\n{text}" for rank, text in failures.items()]
        for rank in hung:
            parts.append(f"--- rank {rank} still running, its stack ---\n{self._stack(rank)}")
        return head + "\n".join(parts)

    def _stack(self, rank: int) -> str:
        return (self._folder / f"stack{rank}").read_text(errors="replace")

    def threads(self) -> int:
        """Of the rank that has most of them."""
        return max(psutil.Process(process.pid).num_threads() for process in self._processes)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(rank: int, world_size: int, pipe: connection.Connection, folder: Path) -> None:
    """Live as one rank: join the world, then run jobs until the session ends."""
    import torch
    import torch.distributed as dist

    from hp_plugin.processes.lifetime import tie_children
    from hp_plugin.processes.scheduling import take_turns

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the session, which then ends its ranks
    stack = open(folder / f"stack{rank}", "w")  # noqa: SIM115 (faulthandler needs it open for good)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    faulthandler.enable(file=stack)  # where a library ends the process
    torch.set_num_threads(1)
    # Megatron-Core's saves start servers of some 200 MB each, which ranks that are killed would leave behind.
    tie_children()
    take_turns()
    _share_gloo_device()
    store = _store(folder, rank, world_size)
    # Nothing waits for the group's own limit: the session kills hung ranks long before.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(hours=1))
    gc.freeze()  # keeps the collections between jobs from walking all of torch
    jobs = 0
    while True:
        try:
            path, filters, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path
        jobs += 1
        try:
            with warnings.catch_warnings():
                warnings.resetwarnings()
                warnings.filters.extend(filters)
                answer = (True, _run_job(call, dist.PrefixStore(f"job{jobs}", store)))
            message = pickle.dumps(answer)
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(message)


def _store(folder: Path, rank: int, world_size: int) -> Any:
    """Where ranks meet: a server on the first of them, since ranks that meet in a file look into it by turns."""
    import torch.distributed as dist

    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        (folder / "port.new").write_text(str(store.port))
        (folder / "port.new").rename(port)
        return store
    while not port.exists():
        time.sleep(0.002)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world_size, is_master=False, wait_for_workers=False)


def _share_gloo_device() -> None:
    """Gives all gloo groups of this process one device: each has a thread that notices its end 10 ms late.

    Megatron-Core makes dozens of groups, and waiting for their threads was more than half of a job's time. Their own
    threads, which run the collectives, are one each instead of two: two can tear the name of what they have last done
    (see `exchange/weights/shards.py`), which is torch's to mend.
    """
    from torch.distributed import ProcessGroupGloo, distributed_c10d

    device = ProcessGroupGloo.create_device(interface="lo")

    class OnOneDevice(ProcessGroupGloo):  # type: ignore[misc]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, **newer: Any) -> None:
            options = ProcessGroupGloo._Options()
            options._devices, options._threads, options._timeout = [device], 1, timeout
            for name, value in newer.items():  # `enable_reconfigure` since torch 2.14
                setattr(options, name, value)
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = OnOneDevice  # type: ignore[misc]


def _die_with(sentinel: int) -> None:
    """End this process when the session ends, even if it was killed and this rank hangs in a collective."""
    connection.wait([sentinel])
    os._exit(1)


def _run_job(call: bytes, store: Any) -> Any:
    """Unpickle and run one body from a fixed random state, then take down all it left behind."""
    import numpy
    import torch
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    default = dist.group.WORLD
    # Groups of the same name (`use_local_synchronization` derives it from the ranks) would otherwise meet
    # the addresses that an earlier job's group left in the store.
    world.pg_map[default] = (world.pg_map[default][0], store)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        body, args = pickle.loads(call)
        return body(*args)
    finally:
        _tear_down_megatron()
        destroy_groups_but(default)
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def prepare_device() -> Any:
    """What a body computes on: the GPU, which all ranks share over gloo and whose products are whole, else the CPU."""
    import torch

    from hp_plugin import cpu_backend
    from hp_plugin.shared_gpus.placing import GLOO, use_gpu

    if not torch.cuda.is_available():
        cpu_backend.enable()
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return use_gpu(GLOO)


def destroy_groups_but(*kept: Any) -> None:
    """Ends all other process groups of this rank, and with them the threads they have."""
    import torch.distributed as dist

    ended = [group for group in dist.distributed_c10d._world.pg_map if group not in kept]
    for number in range(len(ended)):
        dist.destroy_process_group(ended[number])
    # A model that refers to itself holds its groups, and would let go of one after the other.
    gc.collect()
    # By threads, as each of gloo's connections is let go of only when its device next looks for work, in 10 ms.
    with ThreadPoolExecutor(16) as threads:
        for _ in range(len(ended)):
            threads.submit(lambda: ended.pop() and None)


def _tear_down_megatron() -> None:
    """Forget every global of Megatron-Core that a body can have set."""
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as megatron_random

    from hp_plugin.upstream.moe_log import forget_figures
    from hp_plugin.upstream.rotary_cache import forget_angles

    for kind in ("FLASH", "FUSED", "UNFUSED"):  # what a model sets for its attention backend, and the next may not
        os.environ.pop(f"NVTE_{kind}_ATTN", None)
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    forget_figures()
    forget_angles()
