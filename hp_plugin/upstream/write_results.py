"""What the processes that write a checkpoint hand back to their rank, without a server process between them.

Megatron-Core makes a `multiprocessing` manager for it: a process of 250 to 360 MB per rank that imports the script
again, outlives a killed rank and leaves a folder. Its writers are forked, so a file without a name is enough: a pipe is
not, since it holds 64 KiB and nobody reads before the writer has ended.
"""

from __future__ import annotations

import inspect
import os
import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

# 0.15 and 0.16 have the first name, 0.17 and later the second.
_NAMES = ("_get_write_results_queue", "get_write_results_queue")


class WriteResults:
    """The results of one save: put by the rank or a process forked from it, then taken by the rank."""

    def __init__(self) -> None:
        # In memory where that can be: a save must not fail for want of room elsewhere.
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("write results"), "w+b")
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this does)

    def put(self, results: Any) -> None:
        """Keeps results; an error of the writer is one, too."""
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The results.

        Raises:
            queue.Empty: the writer has ended without any.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except EOFError:
            raise queue.Empty from None


def write_without_server() -> None:
    """Has Megatron-Core's own synchronous and forked saves hand back their results in a file, for the whole process.

    To go when a release makes no manager for them. Its persistent writer, which is not forked, still needs one.

    Raises:
        RuntimeError: this release does not make its queue where those from 0.15 to 0.19 do.
    """
    for name in _NAMES:
        original = getattr(filesystem_async, name, None)
        if original is not None and "_results_queue" in inspect.getsource(original):
            setattr(filesystem_async, name, _fresh_results)
            return
        if original is _fresh_results:
            return
    raise RuntimeError(
        f"megatron-core has none of {', '.join(_NAMES)} in {filesystem_async.__name__}: install one of 0.15 to 0.19"
    )


def _fresh_results(mp_mode: str = "spawn") -> WriteResults:
    return WriteResults()
