"""Seconds of a piece of work while every rank does the same, as in a running model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from math import ceil

import torch
import torch.distributed as dist

_STRETCH_S = 0.015
"""Seconds of a timed stretch for each rank that shares a core: several time slices of every one of them."""
_REPEATS = 3


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_together(work: Callable[[], object]) -> float:
    """Seconds of one `work()`, which all ranks call at the same time: the slowest rank's, median of repeats."""
    work()
    stretch = _STRETCH_S * max(1.0, dist.get_world_size() / cpu_cores())
    count = max(1, ceil(stretch / _slowest(_seconds(work, 1))))
    return statistics.median(_slowest(_seconds(work, count)) / count for _ in range(_REPEATS))


def _seconds(work: Callable[[], object], count: int) -> float:
    dist.barrier()
    began = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - began


def _slowest(seconds: float) -> float:
    """The largest of all ranks' values, the same on every rank."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return max(float(value), 1e-9)
