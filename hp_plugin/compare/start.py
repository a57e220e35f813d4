"""Starts the ranks of a comparison on this machine and says in one line what became of them."""

from __future__ import annotations

import logging
import pickle
import warnings
from typing import TYPE_CHECKING

from hp_plugin.processes.lifetime import end_with_parent, tie_children

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from hp_plugin.compare.job import Job


class RankFailedError(Exception):
    """A rank raised or died; all others have been ended."""


def run_on_ranks(job: Job, ranks: int) -> None:
    """Runs a job on `ranks` processes of torch's elastic launcher, which meet on a free port of this machine.

    Raises:
        RankFailedError: in one line, the first failure.
        KeyboardInterrupt: the user stopped it; no rank is left.
    """
    # Here, since importing torch's launcher draws random numbers.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="compare",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # The launcher logs every failing rank with its traceback; one of them is reported here.
    for logger in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        elastic_launch(settings, run_packed)(pickle.dumps(job))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise RankFailedError(f"rank {rank} {describe(failure)}") from None
    except SignalException as stopped:  # the launcher has ended all ranks by now
        raise KeyboardInterrupt from stopped


def run_packed(packed: bytes) -> None:
    """One rank. Unpacked here, so that what stock code says on import is not said once per rank, layer and build."""
    end_with_parent()
    tie_children()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job: Job = pickle.loads(packed)
    from hp_plugin.compare.rank import run_rank

    run_rank(job)


def describe(failure: ProcessFailure) -> str:
    """What happened to a rank, in one line and with the way out where there is one."""
    if failure.exitcode < 0:
        killed = " (often the kernel's answer to a lack of memory)" if failure.exitcode == -9 else ""
        return f"was ended by {failure.signal_name()}{killed}"
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    words = str(message).strip()
    for kind in ("can't allocate memory", "CUDA out of memory"):
        if kind in words:
            return f"ran out of memory: {words}; use fewer ranks, a smaller model or micro-batch"
    return f"failed: {words}"
