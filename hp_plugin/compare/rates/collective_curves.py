"""Collectives by size and group size on the ranks that run, in the planner's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from hp_plugin.compare.ranks.together import seconds_together

_PRODUCT = (512, 512, 256)
"""m, k and n of a product of some milliseconds, like those between two collectives of a layer."""
_SIZES = tuple(1024 * 4**power for power in range(8))
"""Bytes from 1 KiB to 16 MiB, as nccl-tests count them; rounded up to whole elements of every rank."""


def measure_curves(dtype: torch.dtype, source: str) -> dict[str, Any]:
    """Curves of all collectives for every group size that divides the world; all groups of a size run at once.

    Each point is the time that a collective adds to a matrix product. Back to back, as nccl-tests measure, ranks on
    shared cores stay in step, and waiting for the last one, which a model pays at every collective, would be missing.
    """
    world = dist.get_world_size()
    product = _product(dtype)
    alone = seconds_together(product)
    curves: list[dict[str, Any]] = []
    sizes = [size for size in range(2, world + 1) if world % size == 0]
    for size in sizes:
        group, all_groups = dist.new_subgroups(size)
        found = {kind: _curve(make, size, group, product, alone) for kind, make in _COLLECTIVES.items()}
        if size == sizes[0]:
            found["send_recv"] = _curve(_send_recv, size, group, product, alone)
        curves += [
            {
                "collective": kind,
                "ranks": 2 if kind == "send_recv" else size,
                "nodes": 1,
                "kind": "here",
                "source": source,
                "points": points,
            }
            for kind, points in found.items()
        ]
        for each in all_groups:
            if each is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(each)
    return {"unit": "bytes as in nccl-tests, microseconds", "columns": ["bytes", "microseconds"], "curves": curves}


Work = Callable[[], Tensor]
Make = Callable[[Tensor, int, dist.ProcessGroup], Callable[[], object]]


def _product(dtype: torch.dtype) -> Work:
    m, k, n = _PRODUCT
    inputs, weight = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    return lambda: functional.linear(inputs, weight)


def _curve(make: Make, ranks: int, group: dist.ProcessGroup, product: Work, alone: float) -> list[tuple[int, float]]:
    dtype = product().dtype
    points = []
    for size in _SIZES:
        elements = -(-size // (dtype.itemsize * ranks)) * ranks
        collective = make(torch.zeros(elements, dtype=dtype), ranks, group)
        seconds = seconds_together(lambda collective=collective: (product(), collective())) - alone
        # A small difference of two noisy times may come out below nothing.
        points.append((elements * dtype.itemsize, max(seconds * 1e6, 1.0)))
    return points


def _all_reduce(whole: Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    return lambda: dist.all_reduce(whole, group=group)


def _all_gather(whole: Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    part = whole.new_zeros(len(whole) // ranks)
    return lambda: dist.all_gather_into_tensor(whole, part, group=group)


def _reduce_scatter(whole: Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    part = whole.new_zeros(len(whole) // ranks)
    return lambda: dist.reduce_scatter_tensor(part, whole, group=group)


def _all_to_all(whole: Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    received = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(received, whole, group=group)


def _send_recv(whole: Tensor, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """From the first rank of a group to the second, which answers with one element: a pipeline's hand-over."""
    rank, answer = dist.get_group_rank(group, dist.get_rank()), whole[:1]

    def hand_over() -> None:
        if rank == 0:
            dist.send(whole, group=group, group_dst=1)
            dist.recv(answer, group=group, group_src=1)
        elif rank == 1:
            dist.recv(whole, group=group, group_src=0)
            dist.send(answer, group=group, group_dst=0)

    return hand_over


_COLLECTIVES: dict[str, Make] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}
