"""Peak memory of one rank over a piece of work: the CUDA allocator's, or the process's resident memory on Linux."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): resets the high-water mark of resident memory


def reset_peak() -> None:
    """Starts over; on the CPU without Linux's /proc there is nothing to measure."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def return_free_memory() -> None:
    """Gives freed memory back to the system, so that the next peak is the next layout's own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def peak_bytes() -> int | None:
    """The largest amount since `reset_peak`, in bytes; None where it cannot be read."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return None if kilobytes is None else int(kilobytes) * 1024
