"""Slices of heads to contiguous parts of a stock weight and back, within a dim group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hp_plugin.grid.ownership import SlicedAxis

_AT_ONCE = 256 * 2**20
"""Bytes of weights that one collective trades: twice as much is held besides them."""
_ALIGNMENT = 16
"""Bytes between the starts of what a collective sends: a multiple of every element's size."""


def to_stock_part(weight: Tensor, weight_axis: int, axis: SlicedAxis, group: ProcessGroup) -> Tensor:
    """Slice j of every slot of a head group to the j-th of n contiguous parts of its stock block; a collective call.

    Along `weight_axis`: `[slots/m, d/n]` of slice j -> `[slots/(m·n) · d]`, both `axis.local_size` long. Each rank
    sends (n-1)/n of its weight.

    Args:
        group: the dim group; its rank is j.

    Returns:
        a new tensor on the host, where writers copy it first of all. Within `together` it is filled at the end.
    """
    j, others = group.rank(), range(group.size())
    part = torch.empty(weight.shape, dtype=weight.dtype)
    slots, places = _runs(weight, weight_axis, axis), _runs(part, weight_axis, axis)
    leaving = [_stretch(slots, weight_axis, axis.shared_runs(j, k)[0]) for k in others]
    arriving = [_stretch(places, weight_axis, axis.shared_runs(k, j)[1]) for k in others]
    _trade(_Trade(group, leaving, arriving))
    return part


def from_stock_part(part: Tensor, weight_axis: int, axis: SlicedAxis, group: ProcessGroup) -> Tensor:
    """The inverse of `to_stock_part`, on the part's device; a collective call."""
    j, others = group.rank(), range(group.size())
    weight = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    places, slots = _runs(part, weight_axis, axis), _runs(weight, weight_axis, axis)
    leaving = [_stretch(places, weight_axis, axis.shared_runs(k, j)[1]) for k in others]
    arriving = [_stretch(slots, weight_axis, axis.shared_runs(j, k)[0]) for k in others]
    _trade(_Trade(group, leaving, arriving))
    return weight


@contextmanager
def together() -> Iterator[None]:
    """Within it, tensors are traded many at a time, and the last of them at its end."""
    assert _waiting.get() is None, "one inside the other"
    waiting = _Waiting()
    token = _waiting.set(waiting)
    try:
        yield
        waiting.trade()
    finally:
        _waiting.reset(token)


@dataclass
class _Trade:
    """What one tensor sends to each rank of the group and receives from it, as views, equally shaped on both sides."""

    group: ProcessGroup
    leaving: list[Tensor]
    arriving: list[Tensor]


@dataclass
class _Waiting:
    trades: list[_Trade] = field(default_factory=list)
    size: int = 0

    def add(self, trade: _Trade) -> None:
        if self.trades and trade.group is not self.trades[0].group:
            self.trade()
        self.trades.append(trade)
        self.size += sum(_length(view) for view in trade.leaving)
        if self.size > _AT_ONCE:  # on all ranks of a group at the same tensor: their weights have the same shapes
            self.trade()

    def trade(self) -> None:
        if self.trades:
            _all_to_all(self.trades)
        self.trades, self.size = [], 0


_waiting: ContextVar[_Waiting | None] = ContextVar("_waiting", default=None)


def _trade(trade: _Trade) -> None:
    waiting = _waiting.get()
    if waiting is None:
        _all_to_all([trade])
    else:
        waiting.add(trade)


@torch.no_grad()
def _all_to_all(trades: list[_Trade]) -> None:
    group = trades[0].group
    device = _device(trades[0].leaving[0], group)
    ranks = range(group.size())
    # By rank, and of each rank by tensor. What has one shape here has another there where n does not divide the slots.
    leaving = [trade.leaving[k] for k in ranks for trade in trades]
    arriving = [trade.arriving[k] for k in ranks for trade in trades]
    sent, received = _buffer(leaving, device), _buffer(arriving, device)
    for view, place in zip(leaving, _places(leaving, sent), strict=True):
        place.copy_(view)
    lengths = [[sum(_length(trade_views[k]) for trade_views in side) for k in ranks] for side in _sides(trades)]
    dist.all_to_all_single(received, sent, lengths[1], lengths[0], group)
    for view, place in zip(arriving, _places(arriving, received), strict=True):
        view.copy_(place)


def _sides(trades: list[_Trade]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    return [trade.leaving for trade in trades], [trade.arriving for trade in trades]


def _buffer(views: list[Tensor], device: torch.device) -> Tensor:
    # Bytes, since backends do not send every dtype.
    return torch.empty(sum(_length(view) for view in views), dtype=torch.uint8, device=device)


def _places(views: list[Tensor], buffer: Tensor) -> Iterator[Tensor]:
    """Where each view lies in the buffer, in its shape and dtype."""
    for view, (start, _) in zip(views, pairwise(accumulate((_length(v) for v in views), initial=0)), strict=True):
        size = view.numel() * view.element_size()
        yield buffer[start : start + size].view(view.dtype).view(view.shape)


def _length(view: Tensor) -> int:
    return -(view.numel() * view.element_size() // -_ALIGNMENT) * _ALIGNMENT


def _runs(tensor: Tensor, weight_axis: int, axis: SlicedAxis) -> Tensor:
    return tensor.detach().unflatten(weight_axis, (axis.local_slots, axis.local_width))


def _stretch(runs: Tensor, weight_axis: int, which: range) -> Tensor:
    """The view of these runs, evenly spaced."""
    return runs[tuple([slice(None)] * weight_axis + [slice(which.start, which.stop, which.step)])]


def _device(tensor: Tensor, group: ProcessGroup) -> torch.device:
    """Where the group can send from: optimizer state may lie on the host, which NCCL does not reach."""
    if dist.get_backend(group) == "nccl" and tensor.device.type == "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
