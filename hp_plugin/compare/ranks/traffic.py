"""What one rank's collectives cost: time in and waiting for them, and bytes sent, by group axis and kind.

Counted where every call passes, in torch's `ProcessGroup` methods and `Work.wait`, so that calls of Megatron-Core, of
the exchanges and of optimizers are seen alike. Bytes follow the planner's convention (`wire_factor`): what a ring or a
pairwise exchange sends per rank; a message counts at its sender.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from hp_plugin.planner.machine.collectives import wire_factor

# ProcessGroup method -> (kind, which positional argument holds what `wire_factor` counts); torch 2.13 renamed some.
_METHODS = {
    "allreduce": ("all_reduce", 0),
    "allgather": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "alltoall": ("all_to_all", 1),
    "broadcast": ("broadcast", 0),
    # What torch's coalescing manager calls, which Megatron-Core reduces gradients under.
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "send": ("send_recv", 0),
    "recv": ("receive", 0),
}


_MESSAGES = ("send_recv", "receive")

# Descriptions of groups in `megatron.core.parallel_state` and `hp_plugin.grid.groups`.
_AXES = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "HEAD_PARALLEL_GROUP": "head",
    "DIM_PARALLEL_GROUP": "dim",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "EMBEDDING_GROUP": "ends",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP": "edp",
    "MODEL_PARALLEL_GROUP": "world",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "world",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP_WITH_EGTP": "world",
}


@dataclass(frozen=True)
class Call:
    """One collective call of this rank; `sent` in bytes by the convention above."""

    kind: str
    axis: str
    sent: float


@dataclass
class Traffic:
    """The calls of a block in order, and the seconds spent in and waiting for them, by (axis, kind)."""

    calls: list[Call] = field(default_factory=list)
    seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def sent(self) -> dict[tuple[str, str], float]:
        """Bytes sent by (axis, kind)."""
        totals: dict[tuple[str, str], float] = {}
        for call in self.calls:
            totals[call.axis, call.kind] = totals.get((call.axis, call.kind), 0.0) + call.sent
        return totals

    def pipeline_seconds(self) -> float:
        """Seconds in and waiting for messages between pipeline stages."""
        return sum(seconds for (axis, kind), seconds in self.seconds.items() if axis == "pp" and kind in _MESSAGES)


def axis_of(group: dist.ProcessGroup) -> str:
    """The axis that Megatron-Core (or this plugin) made a group for, from the description it gave it."""
    description = str(group.group_desc)
    return _AXES.get(description, "world" if group is dist.group.WORLD else description.lower())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts every collective of this process until the end of the block."""
    traffic = Traffic()
    pending: dict[int, tuple[str, str]] = {}
    # The bound descriptors, for putting them back: pybind's plain functions would no longer get their `self`.
    originals = {name: vars(dist.ProcessGroup)[name] for name in _METHODS if name in vars(dist.ProcessGroup)}
    waits, wait = vars(dist.Work)["wait"], dist.Work.wait

    def add(key: tuple[str, str], began: float) -> None:
        traffic.seconds[key] = traffic.seconds.get(key, 0.0) + time.perf_counter() - began

    def counting(original: Callable[..., Any], kind: str, position: int) -> Callable[..., Any]:
        @wraps(original)
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            key = (axis_of(group), kind)
            began = time.perf_counter()
            work = original(group, *arguments, **options)
            add(key, began)
            size = _bytes(arguments[position]) if len(arguments) > position else 0
            sent = _sent(kind, size, group.size())
            parts = list(arguments[3]) if kind == "all_to_all" and len(arguments) > 3 else []
            if parts:
                # Of different sizes, each rank's own among them: what stays here is not sent.
                sent = size * (1 - float(parts[group.rank()]) / sum(parts)) if sum(parts) else 0.0
            traffic.calls.append(Call(kind, key[0], sent))
            pending[id(work)] = key
            return work

        return call

    def waiting(work: dist.Work, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return wait(work, *arguments, **options)
        finally:
            add(pending.get(id(work), ("other", "wait")), began)

    try:
        for name in originals:
            setattr(dist.ProcessGroup, name, counting(getattr(dist.ProcessGroup, name), *_METHODS[name]))
        dist.Work.wait = waiting  # type: ignore[assignment,method-assign]
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
        dist.Work.wait = waits  # type: ignore[method-assign]


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(part) for part in tensors)


def _sent(kind: str, size: int, ranks: int) -> float:
    if ranks == 1 or kind == "receive":
        return 0.0
    return size * wire_factor("all_gather" if kind == "broadcast" else kind, ranks)
